#include "layers/diffusion_cross_attention.h"

#include <cmath>

#include "graph/functions.h"
#include "layers/attention_math.h"

namespace calotype::nn {

DiffusionCrossAttention::DiffusionCrossAttention(int64_t query_dim, int64_t context_dim,
                                                 int64_t num_heads, int64_t spatial_size)
    : Layer("DiffusionCrossAttention"),
      query_dim_(query_dim),
      context_dim_(context_dim),
      num_heads_(num_heads),
      spatial_size_(spatial_size) {
  Check(query_dim > 0 && context_dim > 0 && num_heads > 0 && spatial_size > 0,
        "DiffusionCrossAttention: query_dim {}, context_dim {}, num_heads {} and spatial_size {} "
        "must "
        "be positive",
        query_dim, context_dim, num_heads, spatial_size);
  Check(query_dim % num_heads == 0,
        "DiffusionCrossAttention: num_heads {} must divide query_dim {}", num_heads, query_dim);
  to_q_ = AddLayer<Linear>("to_q", Linear::Options{query_dim, query_dim, false});
  to_k_ = AddLayer<Linear>("to_k", Linear::Options{context_dim, query_dim, false});
  to_v_ = AddLayer<Linear>("to_v", Linear::Options{context_dim, query_dim, false});
  to_out_ = AddLayer<Linear>("to_out.0", Linear::Options{query_dim, query_dim, true});
}

ComputationGraph DiffusionCrossAttention::ExportGraph(int64_t batch, int64_t context_tokens) {
  std::vector<GraphInput> inputs = {
      {"input", {DType::kF32, {batch, query_dim_, spatial_size_, spatial_size_}}}};
  if (context_tokens > 0) {
    inputs.push_back({"context", {DType::kF32, {batch, context_tokens, context_dim_}}});
  }
  return Export(inputs);
}

std::vector<Value> DiffusionCrossAttention::ExportComputationGraph(ComputationGraph&,
                                                                   std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "input"), context = Optional(inputs, 1);
  bool picture = x.rank() == 4;
  Check<ShapeError>(
      (picture && x.dim(1) == query_dim_) || (x.rank() == 3 && x.dim(2) == query_dim_),
      "{}: input {} must be [B, {}, H, W] or [B, S, {}]", Describe(), x.shape(), query_dim_,
      query_dim_);
  Value tokens = picture ? PictureToTokens(x) : x;
  if (context.defined()) {
    Check<ShapeError>(context.rank() == 3 && context.dim(2) == context_dim_ &&
                          (context.dim(0) == x.dim(0) || context.dim(0) == 1),
                      "{}: context {} must be [{} or 1, L, {}]", Describe(), context.shape(),
                      x.dim(0), context_dim_);
  } else {
    Check<ShapeError>(
        query_dim_ == context_dim_,
        "{}: without a context the layer attends to its input, which needs query_dim {} "
        "= context_dim {}; pass a context",
        Describe(), query_dim_, context_dim_);
    context = tokens;
  }
  AttentionOptions options{
      .heads = num_heads_,
      .scale = 1 / std::sqrt(static_cast<double>(query_dim_) / static_cast<double>(num_heads_))};
  Value y =
      calotype::Attention(to_q_->Call(tokens), to_k_->Call(context), to_v_->Call(context), options)
          .out;
  y = to_out_->Call(y);
  return {picture ? TokensToPicture(y, x.dim(2), x.dim(3)) : y};
}

std::map<std::string, std::string> DiffusionCrossAttention::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  facts["layer.input_shape"] =
      fmt::format("[B, {}, {}, {}]", query_dim_, spatial_size_, spatial_size_);
  facts["layer.output_shape"] = facts["layer.input_shape"];
  facts["attention.query_dim"] = fmt::format("{}", query_dim_);
  facts["attention.context_dim"] = fmt::format("{}", context_dim_);
  facts["attention.heads"] = fmt::format("{}", num_heads_);
  facts["attention.dim_head"] = fmt::format("{}", query_dim_ / num_heads_);
  return facts;
}

}  // namespace calotype::nn
