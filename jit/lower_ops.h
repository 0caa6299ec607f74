// The ops by address, for the lowering's questions about nodes.
#pragma once

#include "graph/op.h"

namespace calotype {

#define CALL(Name) extern const Op k##Name##Op;
#include "graph/ops.def"

namespace jit {

// y[b, c, i, j] = sum_{o, p, q} x[b, o, i + p, j + q] w[o, c, KH - 1 - p, KW - 1 - q]: the gradient
// of a convolution's input, once dy has been padded (and, for a stride, spread with zeros).
extern const Op kCorrelateOp;
extern const Op kWinogradInputOp, kWinogradWeightOp, kWinogradOutputOp;  // lower_winograd.h

inline bool IsLeaf(const ComputationNode& node) { return node.op->kind == OpKind::kLeaf; }
inline bool IsTransparent(const ComputationNode& node) {
  const Op* op = node.op;
  return op == &kReshapeOp || op == &kPermuteOp || op == &kBroadcastOp || op == &kSliceOp ||
         op == &kStopGradientOp || op == &kBarrierOp;
}
inline bool IsElementwise(const ComputationNode& node) {
  return node.op->kind == OpKind::kElementwise || node.op == &kCastOp;
}
inline bool IsReduce(const ComputationNode& node) { return node.op->kind == OpKind::kReduce; }
inline bool IsContraction(const ComputationNode& node) {
  const Op* op = node.op;
  return op == &kMatMulOp || op == &kConv2dOp || op == &kConv2dWeightGradientOp ||
         op == &kCorrelateOp;
}
// The last kernel of a convolution or matrix product, which elementwise readers join.
inline bool EndsProduct(const ComputationNode& node) {
  return IsContraction(node) || node.op == &kWinogradOutputOp;
}
inline bool IsAssembled(const ComputationNode& node) {
  return node.op == &kPadOp || node.op == &kConcatOp;
}
// A constant with one f32 element: an immediate of the programs that use it.
inline bool IsScalarConstant(const ComputationNode& node) {
  return node.op == &kConstantOp && node.types[0].dtype == DType::kF32 &&
         node.constant.elements() == 1;
}

}  // namespace jit
}  // namespace calotype
