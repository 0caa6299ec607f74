#include "layers/flash_attention_layer.h"

#include <cmath>

#include "core/random.h"
#include "graph/functions.h"
#include "layers/activation.h"
#include "layers/attention_math.h"

namespace calotype::nn {

FlashAttentionLayer::FlashAttentionLayer(int64_t sequence_length, int64_t embedding_dimension,
                                         int64_t head_count, FlashAttentionConfig config,
                                         std::string activation)
    : Layer("FlashAttentionLayer"),
      sequence_length_(sequence_length),
      embedding_dimension_(embedding_dimension),
      head_count_(head_count),
      config_(config),
      activation_(std::move(activation)) {
  Check(sequence_length > 0 && embedding_dimension > 0 && head_count > 0,
        "FlashAttentionLayer: sequence_length {}, embedding_dimension {} and head_count {} must be "
        "positive",
        sequence_length, embedding_dimension, head_count);
  Check(embedding_dimension % head_count == 0,
        "FlashAttentionLayer: head_count {} must divide embedding_dimension {}", head_count,
        embedding_dimension);
  Check(config.block_size_q > 0 && config.block_size_kv > 0,
        "FlashAttentionLayer: block sizes {} and {} must be positive", config.block_size_q,
        config.block_size_kv);
  Check(config.dropout_probability >= 0 && config.dropout_probability < 1,
        "FlashAttentionLayer: dropout_probability {} must be in [0, 1)",
        config.dropout_probability);
  CheckActivation(activation_);
  double head = static_cast<double>(embedding_dimension) / static_cast<double>(head_count);
  scale_ = config.scale_factor.value_or(1 / std::sqrt(head));
  Check(std::isfinite(scale_), "FlashAttentionLayer: scale_factor {} must be finite", scale_);
  int64_t e = embedding_dimension;
  to_q_ = AddLayer<Linear>("to_q", Linear::Options{e, e, false});
  to_k_ = AddLayer<Linear>("to_k", Linear::Options{e, e, false});
  to_v_ = AddLayer<Linear>("to_v", Linear::Options{e, e, false});
  to_out_ = AddLayer<Linear>("to_out.0", Linear::Options{e, e, true});
}

ComputationGraph FlashAttentionLayer::ExportGraph(int64_t batch) {
  std::vector<GraphInput> inputs = {
      {"input", {DType::kF32, {batch, sequence_length_, embedding_dimension_}}}};
  if (drops()) inputs.push_back({"seed", {DType::kI64, {1}}});
  return Export(inputs);
}

std::vector<Value> FlashAttentionLayer::ExportComputationGraph(ComputationGraph&,
                                                               std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "input");
  bool picture = x.rank() == 4;
  Check<ShapeError>((picture && x.dim(1) == embedding_dimension_) ||
                        (x.rank() == 3 && x.dim(2) == embedding_dimension_),
                    "{}: input {} must be [B, S, {}] or [B, {}, H, W]", Describe(), x.shape(),
                    embedding_dimension_, embedding_dimension_);
  Value seed = drops() ? Required(inputs, 1, "seed, for dropout in training") : Value{};
  double dropout = drops() ? config_.dropout_probability : 0;
  // Layers of one model that share a seed drop different weights.
  auto stream = drops() ? static_cast<int64_t>(StreamOf(path()) >> 1) : 0;

  Value tokens = picture ? PictureToTokens(x) : x;
  Value q = to_q_->Call(tokens), k = to_k_->Call(tokens), v = to_v_->Call(tokens);
  Value y, weights;
  if (config_.return_attention_weights || (training() && !config_.recompute_in_backward)) {
    auto result = ExplicitAttention(
        q, k, v, head_count_, scale_, {},
        {.causal = config_.use_causal_mask, .dropout = dropout, .stream = stream, .seed = seed});
    y = result.out;
    weights = result.weights;
  } else {
    AttentionOptions options{.heads = head_count_,
                             .scale = scale_,
                             .causal = config_.use_causal_mask,
                             .dropout = dropout,
                             .stream = stream,
                             .block_q = config_.block_size_q,
                             .block_kv = config_.block_size_kv};
    y = calotype::Attention(q, k, v, options, {}, seed).out;
  }
  y = Activate(activation_, to_out_->Call(y));
  if (picture) y = TokensToPicture(y, x.dim(2), x.dim(3));
  if (config_.return_attention_weights) return {y, weights};
  return {y};
}

std::map<std::string, std::string> FlashAttentionLayer::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  auto flag = [](bool value) { return value ? "true" : "false"; };
  facts["layer.input_shape"] = fmt::format("[B, {}, {}]", sequence_length_, embedding_dimension_);
  facts["layer.output_shape"] = facts["layer.input_shape"];
  facts["layer.activation"] = activation_;
  facts["attention.heads"] = fmt::format("{}", head_count_);
  facts["attention.dim_head"] = fmt::format("{}", embedding_dimension_ / head_count_);
  facts["attention.scale"] = fmt::format("{}", scale_);
  facts["attention.block_size_q"] = fmt::format("{}", config_.block_size_q);
  facts["attention.block_size_kv"] = fmt::format("{}", config_.block_size_kv);
  facts["attention.use_causal_mask"] = flag(config_.use_causal_mask);
  facts["attention.dropout_probability"] = fmt::format("{}", config_.dropout_probability);
  facts["attention.recompute_in_backward"] = flag(config_.recompute_in_backward);
  facts["attention.return_attention_weights"] = flag(config_.return_attention_weights);
  return facts;
}

}  // namespace calotype::nn
