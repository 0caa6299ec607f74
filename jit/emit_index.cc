// GatherSpec, ScatterAddSpec and PhiloxSpec.
#include <algorithm>

#include "core/error.h"
#include "jit/emit.h"

namespace calotype::jit {

namespace {

using Value = llvm::Value;
using Values = std::vector<Value*>;

// The index as i64.
Value* LoadIndex(Emitter& e, const Operand& indices, Value* pointer) {
  bool wide = indices.dtype == DType::kI64;
  Check<InternalError>(wide || indices.dtype == DType::kI32, "index kernel: indices are {}",
                       indices.dtype);
  Value* index = e.b.CreateLoad(wide ? e.b.getInt64Ty() : e.b.getInt32Ty(), pointer);
  return wide ? index : e.b.CreateSExt(index, e.b.getInt64Ty());
}

llvm::Type* ElementType(Emitter& e, DType dtype) {
  return dtype == DType::kF32   ? e.b.getFloatTy()
         : dtype == DType::kI32 ? e.b.getInt32Ty()
                                : e.b.getInt64Ty();
}

// Runs body(index of each extent) for all indices of `extents`.
void Nest(Emitter& e, std::span<const int64_t> extents, Values index,
          llvm::function_ref<void(const Values&)> body) {
  if (index.size() == extents.size()) return body(index);
  e.For(extents[index.size()], [&](Value* i) {
    Values next = index;
    next.push_back(i);
    Nest(e, extents, next, body);
  });
}

// Moves `pointer` by the indices along strides[first...].
Value* Move(Emitter& e, Value* pointer, const Operand& operand, size_t first, const Values& index) {
  for (size_t d = 0; d < index.size(); ++d) {
    pointer = e.At(pointer, operand.dtype, index[d], operand.strides[first + d]);
  }
  return pointer;
}

// The inner dimensions of gather and scatter: all but the last as loops, the last in vectors where
// both sides are contiguous. body(positions of all inner dimensions, width).
void InnerVectors(Emitter& e, const std::vector<int64_t>& inner, bool contiguous,
                  llvm::function_ref<void(const Values&, int width, int valid)> body) {
  if (inner.empty()) return body({}, 1, 1);
  std::span<const int64_t> outer(inner.data(), inner.size() - 1);
  int width = contiguous ? e.target.vector_width : 1;
  int64_t last = inner.back(), whole = last / width * width;
  Nest(e, outer, {}, [&](const Values& index) {
    Values all = index;
    all.push_back(nullptr);
    e.For(e.I64(0), e.I64(whole), width, [&](Value* i) {
      all.back() = i;
      body(all, width, width);
    });
    if (whole < last) {
      all.back() = e.I64(whole);
      body(all, width, static_cast<int>(last - whole));
    }
  });
}

bool Contiguous(const Operand& x, const Operand& y, size_t inner) {
  return inner > 0 && x.strides.back() == 1 && y.strides.back() == 1 && x.dtype == DType::kF32;
}

}  // namespace

void EmitGather(Emitter& e, const GatherSpec& s) {
  size_t outer = s.outer.size(), index_rank = s.index.size(), inner = s.inner.size();
  Check<InternalError>(
      s.x.strides.size() == outer + 1 + inner && s.indices.strides.size() == index_rank &&
          s.out.strides.size() == outer + index_rank + inner && s.x.dtype == s.out.dtype,
      "gather kernel: {}, {} and {} strides for {} + {} + {} dimensions", s.x.strides.size(),
      s.indices.strides.size(), s.out.strides.size(), outer, index_rank, inner);
  // A unit is one outer position and one index.
  std::vector<int64_t> extents = s.outer;
  extents.insert(extents.end(), s.index.begin(), s.index.end());
  auto [first, last] = e.Units(Product(extents), Chunks(KernelSpec(s)));
  bool contiguous = Contiguous(s.x, s.out, inner);
  e.For(first, last, 1, [&](Value* unit) {
    Values position = e.Unflatten(unit, extents);
    Values o(position.begin(), position.begin() + static_cast<int64_t>(outer));
    Values i(position.begin() + static_cast<int64_t>(outer), position.end());
    Value* index = LoadIndex(e, s.indices, Move(e, e.Base(s.indices), s.indices, 0, i));
    Value* from = Move(e, e.Base(s.x), s.x, 0, o);
    from = e.At(from, s.x.dtype, index, s.x.strides[outer]);
    Value* to = Move(e, e.Base(s.out), s.out, 0, position);
    InnerVectors(e, s.inner, contiguous, [&](const Values& r, int width, int valid) {
      Value* source = Move(e, from, s.x, outer + 1, r);
      Value* target = Move(e, to, s.out, outer + index_rank, r);
      if (width == 1) {
        e.b.CreateStore(e.b.CreateLoad(ElementType(e, s.x.dtype), source), target);
      } else {
        e.Store(e.Load(source, DType::kF32, 1, width, valid), target, DType::kF32, 1, width, valid);
      }
    });
  });
}

void EmitScatterAdd(Emitter& e, const ScatterAddSpec& s) {
  size_t outer = s.outer.size(), index_rank = s.index.size(), inner = s.inner.size();
  Check<InternalError>(
      s.dy.strides.size() == outer + index_rank + inner && s.indices.strides.size() == index_rank &&
          s.out.strides.size() == outer + 1 + inner && s.dy.dtype == DType::kF32 &&
          s.out.dtype == DType::kF32,
      "scatter kernel: {}, {} and {} strides for {} + {} + {} dimensions", s.dy.strides.size(),
      s.indices.strides.size(), s.out.strides.size(), outer, index_rank, inner);
  // A unit is one outer position and a piece of the last inner dimension; it runs through all
  // indices in order, so that no two units write one element.
  int64_t chunks = Chunks(KernelSpec(s));
  int width = e.target.vector_width;
  int64_t last_extent = inner > 0 ? s.inner.back() : 1;
  int64_t pieces = std::max<int64_t>(1, std::min(chunks, (last_extent + width - 1) / width));
  int64_t piece = ((last_extent + pieces - 1) / pieces + width - 1) / width * width;
  pieces = std::max<int64_t>(1, (last_extent + piece - 1) / piece);
  bool contiguous = Contiguous(s.dy, s.out, inner);
  std::vector<int64_t> extents = s.outer;
  extents.push_back(pieces);
  auto [first, last] = e.Units(Product(extents), chunks);
  e.For(first, last, 1, [&](Value* unit) {
    Values position = e.Unflatten(unit, extents);
    Values o(position.begin(), position.end() - 1);
    Value* begin = e.Mul(position.back(), piece);
    Value* end = e.Min(e.Add(begin, e.I64(piece)), e.I64(last_extent));
    Value* whole_end = e.Min(end, e.I64(last_extent / width * width));
    int tail = static_cast<int>(last_extent % width);
    // Calls body(inner position, width, valid) for this unit's piece.
    auto for_inner = [&](llvm::function_ref<void(const Values&, int, int)> body) {
      if (inner == 0) return body({}, 1, 1);
      std::span<const int64_t> others(s.inner.data(), inner - 1);
      Nest(e, others, {}, [&](const Values& index) {
        Values all = index;
        all.push_back(nullptr);
        auto at = [&](Value* i, int lanes, int valid) {
          all.back() = i;
          body(all, lanes, valid);
        };
        if (!contiguous) return e.For(begin, end, 1, [&](Value* i) { at(i, 1, 1); });
        e.For(begin, whole_end, width, [&](Value* i) { at(i, width, width); });
        if (tail > 0) {
          e.If(e.b.CreateICmpEQ(end, e.I64(last_extent)),
               [&] { at(e.I64(last_extent - tail), width, tail); });
        }
      });
    };
    Value* out = Move(e, e.Base(s.out), s.out, 0, o);
    e.For(s.axis_size, [&](Value* row) {
      Value* to = e.At(out, DType::kF32, row, s.out.strides[outer]);
      for_inner([&](const Values& r, int lanes, int valid) {
        e.Store(e.Splat(0.0, lanes), Move(e, to, s.out, outer + 1, r), DType::kF32, 1, lanes,
                valid);
      });
    });
    Value* from = Move(e, e.Base(s.dy), s.dy, 0, o);
    Nest(e, s.index, {}, [&](const Values& i) {
      Value* index = LoadIndex(e, s.indices, Move(e, e.Base(s.indices), s.indices, 0, i));
      Value* to = e.At(out, DType::kF32, index, s.out.strides[outer]);
      Value* source = Move(e, from, s.dy, outer, i);
      for_inner([&](const Values& r, int lanes, int valid) {
        Value* target = Move(e, to, s.out, outer + 1, r);
        Value* added =
            e.Load(Move(e, source, s.dy, outer + index_rank, r), DType::kF32, 1, lanes, valid);
        Value* before = e.Load(target, DType::kF32, 1, lanes, valid);
        e.Store(e.b.CreateFAdd(before, added), target, DType::kF32, 1, lanes, valid);
      });
    });
  });
}

void EmitPhilox(Emitter& e, const PhiloxSpec& s) {
  // core/philox.h with one index in each lane: words of 32 bits in lanes of 64, so that the product
  // of two is one instruction.
  int width = e.target.vector_width;
  auto* i32 = llvm::FixedVectorType::get(e.b.getInt32Ty(), width);
  int64_t vectors = (s.elements + width - 1) / width, whole = s.elements / width;
  auto [first, last] = e.Units(vectors, Chunks(KernelSpec(s)));
  Value* seed = e.b.CreateLoad(e.b.getInt64Ty(), e.Base(s.seed));
  auto constant = [&](uint64_t c) { return e.b.CreateVectorSplat(width, e.b.getInt64(c)); };
  Value* mask = constant(0xffffffff);
  auto low = [&](Value* x) { return e.b.CreateAnd(x, mask); };
  auto high = [&](Value* x) { return e.b.CreateLShr(x, 32); };
  Value* key = e.b.CreateVectorSplat(width, seed);
  Value* out = e.Base(s.out);
  std::vector<llvm::Constant*> iota;
  for (int i = 0; i < width; ++i) iota.push_back(e.b.getInt64(i));
  auto emit = [&](Value* vector, int valid) {
    Value* position = e.Mul(vector, width);
    Value* index =
        e.b.CreateAdd(e.b.CreateVectorSplat(width, position), llvm::ConstantVector::get(iota));
    uint64_t stream = static_cast<uint64_t>(s.stream);
    Values c = {low(index), high(index), constant(stream & 0xffffffff), constant(stream >> 32)};
    Value *k0 = low(key), *k1 = high(key);
    for (int round = 0; round < 10; ++round) {
      Value* p0 = e.b.CreateMul(low(c[0]), constant(0xD2511F53));
      Value* p1 = e.b.CreateMul(low(c[2]), constant(0xCD9E8D57));
      c = {e.b.CreateXor(e.b.CreateXor(high(p1), c[1]), k0), low(p1),
           e.b.CreateXor(e.b.CreateXor(high(p0), c[3]), k1), low(p0)};
      k0 = low(e.b.CreateAdd(k0, constant(0x9E3779B9)));
      k1 = low(e.b.CreateAdd(k1, constant(0xBB67AE85)));
    }
    c[0] = e.b.CreateTrunc(c[0], i32);
    Value* uniform = e.b.CreateSIToFP(e.b.CreateLShr(c[0], 8), e.Float(width));
    uniform = e.b.CreateFMul(uniform, e.Splat(0x1p-24, width));
    e.Store(uniform, e.At(out, DType::kF32, position, 1), DType::kF32, 1, width, valid);
  };
  e.For(first, e.Min(last, e.I64(whole)), 1, [&](Value* vector) { emit(vector, width); });
  if (whole < vectors) {
    e.If(e.b.CreateAnd(e.b.CreateICmpSLE(first, e.I64(whole)),
                       e.b.CreateICmpSGT(last, e.I64(whole))),
         [&] { emit(e.I64(whole), static_cast<int>(s.elements - whole * width)); });
  }
}

}  // namespace calotype::jit
