// PhiloxUniform: random numbers as a pure function of a seed.
#include "core/error.h"
#include "core/parallel.h"
#include "core/philox.h"
#include "graph/functions.h"
#include "graph/op.h"

namespace calotype {

extern const Op kPhiloxUniformOp;

namespace {

std::vector<TensorType> Infer(const InferContext& context) {
  Check<ShapeError>(context.inputs[0] == TensorType{DType::kI64, Shape{1}},
                    "PhiloxUniform: seed is {}, expects i64[1]", context.inputs[0]);
  return {{DType::kF32, Shape(context.attrs.Ints("shape"))}};
}

template <class T>
void Run(const RunContext& context) {
  const uint64_t seed = static_cast<uint64_t>(context.inputs[0].data<int64_t>()[0]);
  const uint64_t stream = static_cast<uint64_t>(context.attrs.Int("stream"));
  T* y = context.outputs[0].data<T>();
  ParallelFor(context.outputs[0].elements(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      y[i] = static_cast<T>(PhiloxUniformAt(seed, stream, static_cast<uint64_t>(i)));
    }
  });
}

std::vector<OpSample> Samples() {
  std::vector<OpSample> samples;
  for (const Shape& shape : {Shape{}, Shape{5}, Shape{3, 17}, Shape{2, 3, 1000}, Shape{0, 2}}) {
    samples.push_back(
        {{{DType::kI64, Shape{1}}}, {{"shape", shape.ToVector()}, {"stream", int64_t{5}}}});
  }
  return samples;
}

}  // namespace

const Op kPhiloxUniformOp{
    .name = "PhiloxUniform",
    .kind = OpKind::kCall,
    .min_arity = 1,
    .max_arity = 1,
    .doc =
        "uniform numbers in [0, 1) of `shape`: the upper 24 bits of word 0 of "
        "Philox4x32-10 at counter (i, stream), key seed",
    .source = "Salmon et al. 2011",
    .infer = Infer,
    .run = Run<float>,
    .reference = Run<double>,
    .samples = Samples};

Value PhiloxUniform(Value seed, const Shape& shape, int64_t stream) {
  return seed.graph->EmitOne(kPhiloxUniformOp, {seed},
                             {{"shape", shape.ToVector()}, {"stream", stream}});
}

}  // namespace calotype
