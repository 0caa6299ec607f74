#include "jit/emit.h"

#include <llvm/IR/Intrinsics.h>

#include <algorithm>

#include "core/error.h"

namespace calotype::jit {

namespace {

llvm::Type* ElementType(llvm::LLVMContext& context, DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return llvm::Type::getFloatTy(context);
    case DType::kI32:
      return llvm::Type::getInt32Ty(context);
    case DType::kI64:
      return llvm::Type::getInt64Ty(context);
    case DType::kF64:
      break;
  }
  Fail<UnsupportedError>("compiled code handles f32, i32 and i64, not {}", dtype);
}

llvm::Type* VectorOf(llvm::Type* element, int width) {
  return width == 1 ? element : llvm::FixedVectorType::get(element, width);
}

// A constant mask of the lanes [0, valid).
llvm::Constant* Mask(llvm::LLVMContext& context, int width, int valid) {
  std::vector<llvm::Constant*> bits;
  for (int i = 0; i < width; ++i) {
    bits.push_back(llvm::ConstantInt::getBool(context, i < valid));
  }
  return llvm::ConstantVector::get(bits);
}

}  // namespace

int64_t Product(std::span<const int64_t> extents) {
  int64_t product = 1;
  for (int64_t extent : extents) product *= extent;
  return product;
}

Emitter::Emitter(const Target& target, llvm::Module& module, const std::string& name)
    : target(target), context(module.getContext()), module(module), b(module.getContext()) {
  auto* i64 = b.getInt64Ty();
  auto* type = llvm::FunctionType::get(b.getVoidTy(), {b.getPtrTy(), i64, i64}, false);
  function = llvm::Function::Create(type, llvm::Function::ExternalLinkage, name, module);
  function->setDSOLocal(true);
  function->addFnAttr(llvm::Attribute::NoUnwind);
  function->addFnAttr("no-builtins");
  function->addFnAttr("target-cpu", target.cpu);
  function->addFnAttr("target-features", target.features);
  function->addFnAttr("prefer-vector-width", std::to_string(32 * target.vector_width));
  function->addParamAttr(0, llvm::Attribute::NoAlias);
  function->addParamAttr(0, llvm::Attribute::ReadOnly);
  pointers_ = function->getArg(0);
  begin = function->getArg(1);
  end = function->getArg(2);
  entry_ = llvm::BasicBlock::Create(context, "entry", function);
  auto* body = llvm::BasicBlock::Create(context, "body", function);
  b.SetInsertPoint(body);
}

void Emitter::Finish() {
  b.CreateRetVoid();
  llvm::IRBuilder<>(entry_).CreateBr(entry_->getNextNode());
}

llvm::Type* Emitter::Float(int width) { return VectorOf(b.getFloatTy(), width); }
llvm::Type* Emitter::Int(int width) { return VectorOf(b.getInt32Ty(), width); }

llvm::Value* Emitter::Splat(double value, int width) {
  return llvm::ConstantFP::get(Float(width), llvm::APFloat(static_cast<float>(value)));
}

llvm::Value* Emitter::Splat(Value* scalar, int width) {
  return width == 1 ? scalar : b.CreateVectorSplat(width, scalar);
}

llvm::Value* Emitter::Min(Value* x, Value* y) {
  return b.CreateSelect(b.CreateICmpSLT(x, y), x, y);
}

Emitter::Values Emitter::Fold(Value* from, Value* to, int64_t step, Values state,
                              llvm::function_ref<Values(Value*, const Values&)> body) {
  auto* first = llvm::dyn_cast<llvm::ConstantInt>(from);
  auto* last = llvm::dyn_cast<llvm::ConstantInt>(to);
  bool constant = first && last;
  if (constant) {
    int64_t turns = (last->getSExtValue() - first->getSExtValue() + step - 1) / step;
    if (turns <= 0) return state;
    if (turns == 1) return body(from, state);
  }
  llvm::BasicBlock* before = b.GetInsertBlock();
  auto* loop = llvm::BasicBlock::Create(context, "loop", function);
  auto* after = llvm::BasicBlock::Create(context, "after", function);
  if (constant) {
    b.CreateBr(loop);
  } else {
    b.CreateCondBr(b.CreateICmpSLT(from, to), loop, after);
  }
  b.SetInsertPoint(loop);
  llvm::PHINode* index = b.CreatePHI(b.getInt64Ty(), 2);
  index->addIncoming(from, before);
  Values carried;
  for (Value* value : state) {
    llvm::PHINode* phi = b.CreatePHI(value->getType(), 2);
    phi->addIncoming(value, before);
    carried.push_back(phi);
  }
  Values next = body(index, carried);
  llvm::BasicBlock* latch = b.GetInsertBlock();
  Value* increased = Add(index, I64(step));
  index->addIncoming(increased, latch);
  for (size_t i = 0; i < next.size(); ++i) {
    llvm::cast<llvm::PHINode>(carried[i])->addIncoming(next[i], latch);
  }
  b.CreateCondBr(b.CreateICmpSLT(increased, to), loop, after);
  b.SetInsertPoint(after);
  if (constant) return next;
  Values result;
  for (size_t i = 0; i < next.size(); ++i) {
    llvm::PHINode* phi = b.CreatePHI(next[i]->getType(), 2);
    phi->addIncoming(state[i], before);
    phi->addIncoming(next[i], latch);
    result.push_back(phi);
  }
  return result;
}

Emitter::Values Emitter::Fold(int64_t n, Values state,
                              llvm::function_ref<Values(Value*, const Values&)> body) {
  return Fold(I64(0), I64(n), 1, std::move(state), body);
}

void Emitter::For(Value* from, Value* to, int64_t step, llvm::function_ref<void(Value*)> body) {
  Fold(from, to, step, {}, [&](Value* index, const Values&) {
    body(index);
    return Values{};
  });
}

void Emitter::For(int64_t n, llvm::function_ref<void(Value*)> body) {
  For(I64(0), I64(n), 1, body);
}

void Emitter::If(Value* condition, llvm::function_ref<void()> body) {
  if (auto* constant = llvm::dyn_cast<llvm::ConstantInt>(condition)) {
    if (constant->isOne()) body();
    return;
  }
  auto* then = llvm::BasicBlock::Create(context, "then", function);
  auto* after = llvm::BasicBlock::Create(context, "endif", function);
  b.CreateCondBr(condition, then, after);
  b.SetInsertPoint(then);
  body();
  b.CreateBr(after);
  b.SetInsertPoint(after);
}

std::pair<llvm::Value*, llvm::Value*> Emitter::Units(int64_t units, int64_t chunks) {
  if (chain_) return {I64(0), I64(units)};
  if (units == chunks) return {begin, end};
  auto bound = [&](Value* chunk) { return b.CreateSDiv(Mul(chunk, units), I64(chunks)); };
  return {bound(begin), bound(end)};
}

Emitter::Values Emitter::Unflatten(Value* index, std::span<const int64_t> extents) {
  Values result(extents.size());
  for (size_t d = extents.size(); d-- > 0;) {
    if (d == 0) {
      result[d] = index;
    } else {
      result[d] = b.CreateURem(index, I64(extents[d]));
      index = b.CreateUDiv(index, I64(extents[d]));
    }
  }
  return result;
}

llvm::Value* Emitter::Base(const Operand& operand) {
  Check<InternalError>(operand.pointer >= 0, "kernel operand without a pointer");
  if (bases_.size() <= static_cast<size_t>(operand.pointer)) bases_.resize(operand.pointer + 1);
  Value*& base = bases_[operand.pointer];
  if (!base) {
    llvm::IRBuilder<> entry(entry_);
    base = entry.CreateLoad(entry.getPtrTy(),
                            entry.CreateConstGEP1_64(entry.getPtrTy(), pointers_, operand.pointer));
  }
  Value* here = At(base, operand.dtype, operand.offset);
  return chain_ ? At(here, operand.dtype, chain_, operand.chain) : here;
}

void Emitter::InChain(Value* index, llvm::function_ref<void()> body) {
  chain_ = index;
  body();
  chain_ = nullptr;
}

llvm::Value* Emitter::At(Value* pointer, DType dtype, int64_t elements) {
  if (elements == 0) return pointer;
  return b.CreateInBoundsGEP(ElementType(context, dtype), pointer, I64(elements));
}

llvm::Value* Emitter::At(Value* pointer, DType dtype, Value* index, int64_t stride) {
  if (stride == 0) return pointer;
  if (auto* constant = llvm::dyn_cast<llvm::ConstantInt>(index)) {
    return At(pointer, dtype, constant->getSExtValue() * stride);
  }
  return b.CreateInBoundsGEP(ElementType(context, dtype), pointer, Mul(index, stride));
}

llvm::Value* Emitter::Load(Value* pointer, DType dtype, int64_t stride, int width, int valid) {
  llvm::Type* element = ElementType(context, dtype);
  llvm::Align align(DTypeSize(dtype));
  auto convert = [&](Value* x, int lanes) {
    return dtype == DType::kF32 ? x : b.CreateSIToFP(x, Float(lanes));
  };
  if (width == 1) return convert(b.CreateAlignedLoad(element, pointer, align), 1);
  if (stride == 0) {
    Value* repeated = Splat(convert(b.CreateAlignedLoad(element, pointer, align), 1), width);
    if (valid == width) return repeated;
    return b.CreateSelect(Mask(context, width, valid), repeated, Splat(0.0, width));
  }
  llvm::Type* type = VectorOf(element, width);
  if (stride == 1 && valid == width) {
    return convert(b.CreateAlignedLoad(type, pointer, align), width);
  }
  if (stride == 1 && target.masks) {
    return convert(b.CreateMaskedLoad(type, pointer, align, Mask(context, width, valid),
                                      llvm::Constant::getNullValue(type)),
                   width);
  }
  Value* gathered = llvm::Constant::getNullValue(type);
  for (int lane = 0; lane < valid; ++lane) {
    Value* one = b.CreateAlignedLoad(element, At(pointer, dtype, lane * stride), align);
    gathered = b.CreateInsertElement(gathered, one, lane);
  }
  return convert(gathered, width);
}

void Emitter::Store(Value* value, Value* pointer, DType dtype, int64_t stride, int width,
                    int valid) {
  llvm::Align align(DTypeSize(dtype));
  if (dtype != DType::kF32) {
    // Out of the integers' range the result is unspecified, but not undefined behaviour.
    llvm::Type* type = VectorOf(ElementType(context, dtype), width);
    value = b.CreateFreeze(b.CreateFPToSI(value, type));
  }
  if (width == 1 || (stride == 1 && valid == width)) {
    b.CreateAlignedStore(value, pointer, align);
  } else if (stride == 1 && target.masks) {
    b.CreateMaskedStore(value, pointer, align, Mask(context, width, valid));
  } else {
    for (int lane = 0; lane < valid; ++lane) {
      b.CreateAlignedStore(b.CreateExtractElement(value, lane), At(pointer, dtype, lane * stride),
                           align);
    }
  }
}

void Emitter::Prefetch(Value* pointer, bool to_write) {
  constexpr int kNear = 3, kData = 1;
  b.CreateIntrinsic(llvm::Intrinsic::prefetch, {pointer->getType()},
                    {pointer, b.getInt32(to_write), b.getInt32(kNear), b.getInt32(kData)});
}

llvm::Value* Emitter::Spread(Value* pointer, DType dtype, int64_t outer, int64_t inner,
                             int64_t group, int64_t first, int width, int valid) {
  std::vector<int> lanes(width, 0);
  if (inner == 0) {
    int64_t from = first / group, last = (first + valid - 1) / group;
    for (int l = 0; l < valid; ++l) lanes[l] = static_cast<int>((first + l) / group - from);
    int count = static_cast<int>(last - from + 1);
    Value* few = Load(At(pointer, dtype, from * outer), dtype, count == 1 ? 0 : outer, width,
                      count == 1 ? width : count);
    return b.CreateShuffleVector(few, lanes);
  }
  if (outer == 0 && group <= width) {
    for (int l = 0; l < valid; ++l) lanes[l] = static_cast<int>((first + l) % group);
    Value* few = Load(pointer, dtype, inner, width, static_cast<int>(group));
    return b.CreateShuffleVector(few, lanes);
  }
  Value* gathered = Splat(0.0, width);
  for (int l = 0; l < valid; ++l) {
    int64_t x = first + l;
    Value* from = At(pointer, dtype, x / group * outer + x % group * inner);
    gathered = b.CreateInsertElement(gathered, Load(from, dtype, 0, 1, 1), l);
  }
  return gathered;
}

llvm::Value* Emitter::Scratch(int64_t count) {
  llvm::IRBuilder<> entry(entry_, entry_->begin());
  auto* room = entry.CreateAlloca(llvm::ArrayType::get(b.getFloatTy(), count));
  room->setAlignment(llvm::Align(64));
  return room;
}

llvm::Value* Emitter::MultiplyAdd(Value* x, Value* y, Value* z) {
  if (target.fma) return b.CreateIntrinsic(llvm::Intrinsic::fma, {z->getType()}, {x, y, z});
  return b.CreateFAdd(b.CreateFMul(x, y), z);
}

llvm::Value* Emitter::Horizontal(Value* x, int width,
                                 llvm::function_ref<Value*(Value*, Value*)> combine) {
  while (width > 1) {
    width /= 2;
    std::vector<int> low(width), high(width);
    for (int i = 0; i < width; ++i) {
      low[i] = i;
      high[i] = width + i;
    }
    Value* first = b.CreateShuffleVector(x, low);
    Value* second = b.CreateShuffleVector(x, high);
    x = combine(first, second);
  }
  return b.CreateExtractElement(x, uint64_t{0});
}

Emitter::Values Emitter::Transpose(const Values& rows) {
  // log2(n) stages; stage s exchanges the halves of blocks of 2s rows and lanes.
  int n = static_cast<int>(rows.size());
  Values now = rows;
  for (int s = n / 2; s >= 1; s /= 2) {
    Values next(n);
    std::vector<int> low(n), high(n);
    for (int lane = 0; lane < n; ++lane) {
      bool second = lane & s;
      low[lane] = second ? n + (lane ^ s) : lane;
      high[lane] = second ? n + lane : (lane | s);
    }
    for (int row = 0; row < n; ++row) {
      if (row & s) continue;
      next[row] = b.CreateShuffleVector(now[row], now[row | s], low);
      next[row | s] = b.CreateShuffleVector(now[row], now[row | s], high);
    }
    now = next;
  }
  return now;
}

void EmitChain(Emitter& e, const ChainSpec& spec) {
  struct {
    Emitter& e;
    void operator()(const LoopSpec& s) { EmitLoop(e, s); }
    void operator()(const ReduceSpec& s) { EmitReduce(e, s); }
  } visitor{e};
  auto [first, last] = e.Units(spec.extent, Chunks(spec));
  e.For(first, last, 1, [&](llvm::Value* index) {
    e.InChain(index, [&] {
      for (const ChainSpec::Link& link : spec.links) std::visit(visitor, link);
    });
  });
}

void EmitKernel(const Target& target, llvm::Module& module, const std::string& name,
                const KernelSpec& spec) {
  Emitter e(target, module, name);
  if (Chunks(spec) > 0) {
    struct {
      Emitter& e;
      void operator()(const LoopSpec& s) { EmitLoop(e, s); }
      void operator()(const ReduceSpec& s) { EmitReduce(e, s); }
      void operator()(const ChainSpec& s) { EmitChain(e, s); }
      void operator()(const ContractionSpec& s) { EmitContraction(e, s); }
      void operator()(const AttentionSpec& s) { EmitAttention(e, s); }
      void operator()(const AttentionGradientSpec& s) { EmitAttentionGradient(e, s); }
      void operator()(const GatherSpec& s) { EmitGather(e, s); }
      void operator()(const ScatterAddSpec& s) { EmitScatterAdd(e, s); }
      void operator()(const PhiloxSpec& s) { EmitPhilox(e, s); }
    } visitor{e};
    std::visit(visitor, spec);
  }
  e.Finish();
}

}  // namespace calotype::jit
