#include "models/caption_encoder.h"

#include <limits>

#include "graph/functions.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

template <class C, class Fields>
void VisitFields(C& c, Fields& fields) {
  fields.Only("_class_name", "CaptionEncoder");
  fields.Field("vocabulary", c.vocabulary);
  fields.Field("max_length", c.max_length);
  fields.Field("hidden_size", c.hidden_size);
  fields.Field("num_layers", c.num_layers);
  fields.Field("num_attention_heads", c.num_attention_heads);
  fields.Field("causal", c.causal);
  fields.Field("final_layer_norm", c.final_layer_norm);
}

}  // namespace

CaptionEncoderConfig CaptionEncoderConfig::FromJson(std::string_view text) {
  CaptionEncoderConfig c;
  JsonFields fields("CaptionEncoder", text);
  VisitFields(c, fields);
  fields.CheckAllRead();
  c.Validate();
  return c;
}

std::string CaptionEncoderConfig::ToJson() const {
  JsonWriter writer;
  VisitFields(*this, writer);
  return writer.Text();
}

void CaptionEncoderConfig::Validate() const {
  Tokenizer();
  Check(hidden_size > 0 && hidden_size <= 1 << 20,
        "CaptionEncoder: field 'hidden_size' is {}, must be in [1, {}]", hidden_size, 1 << 20);
  Check(max_length <= 1 << 20, "CaptionEncoder: field 'max_length' is {}, must be in [1, {}]",
        max_length, 1 << 20);
  Check(num_layers >= 0 && num_layers <= 1000,
        "CaptionEncoder: field 'num_layers' is {}, must be in [0, 1000]", num_layers);
  Check(num_attention_heads > 0 && hidden_size % num_attention_heads == 0,
        "CaptionEncoder: num_attention_heads {} must divide hidden_size {}", num_attention_heads,
        hidden_size);
}

CaptionEncoder::CaptionEncoder(const CaptionEncoderConfig& config)
    : Layer("CaptionEncoder"), config_(config) {
  const CaptionEncoderConfig& c = config_;
  c.Validate();
  token_embedding_ = AddLayer<nn::Embedding>(
      "token_embedding",
      nn::Embedding::Options{static_cast<int64_t>(c.vocabulary.size()), c.hidden_size});
  position_embedding_ = AddLayer<nn::Embedding>(
      "position_embedding", nn::Embedding::Options{c.max_length, c.hidden_size});
  for (int64_t i = 0; i < c.num_layers; ++i) {
    blocks_.push_back(AddLayer<nn::BasicTransformerBlock>(
        fmt::format("blocks.{}", i),
        nn::BasicTransformerBlock::Options{
            .dim = c.hidden_size,
            .num_attention_heads = c.num_attention_heads,
            .attention_head_dim = c.hidden_size / c.num_attention_heads}));
  }
  if (c.final_layer_norm) {
    final_layer_norm_ =
        AddLayer<nn::LayerNorm>("final_layer_norm", nn::LayerNorm::Options{c.hidden_size});
  }
}

std::vector<Value> CaptionEncoder::ExportComputationGraph(ComputationGraph& graph,
                                                          std::span<const Value> inputs) {
  Value ids = Required(inputs, 0, "ids");
  Check<ShapeError>(ids.rank() == 2 && ids.dim(1) > 0 && ids.dim(1) <= config_.max_length,
                    "{}: ids {} must be [B, T] with T from 1 to {}", Describe(), ids.shape(),
                    config_.max_length);
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < ids.dim(1); ++i) positions.push_back(i);
  Value x = token_embedding_->Call(ids) +
            position_embedding_->Call(graph.Constant(Tensor::From({ids.dim(1)}, positions)));
  Value mask;  // [B, T, T], added to the scores
  if (config_.causal && !blocks_.empty()) {
    const int64_t t = ids.dim(1);
    Tensor after = Tensor::Zeros({1, t, t});
    for (int64_t i = 0; i < t; ++i) {
      for (int64_t j = i + 1; j < t; ++j)
        after.data()[i * t + j] = -std::numeric_limits<float>::infinity();
    }
    mask = Broadcast(graph.Constant(after), {ids.dim(0), t, t});
  }
  for (auto* block : blocks_) x = block->Call({x, Value{}, mask});
  if (final_layer_norm_) x = final_layer_norm_->Call(x);
  return {x};
}

}  // namespace calotype
