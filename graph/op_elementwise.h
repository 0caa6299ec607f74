// What all elementwise ops share: type inference, execution with broadcasting, the gradient from
// the derivative ops, and samples.
#pragma once

#include "graph/op.h"

namespace calotype {

std::vector<TensorType> InferElementwise(const InferContext& context);
void RunElementwise(const RunContext& context);
void ReferenceElementwise(const RunContext& context);
std::vector<Value> GradientElementwise(const GradientContext& context);
// Samples for an op of this arity: equal shapes, broadcasts, tails, sizes 0 and 1.
std::vector<OpSample> (*SamplesElementwise(int arity))();

// Sums the axes along which a value of `shape` was broadcast, so that the result has that shape.
Value SumTo(Value x, const Shape& shape);

}  // namespace calotype
