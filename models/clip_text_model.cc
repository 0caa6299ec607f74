#include "models/clip_text_model.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "graph/functions.h"
#include "layers/activation.h"
#include "layers/transformer.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

constexpr std::string_view kOwner = "CLIPTextModel";
constexpr std::string_view kPrefix = "text_model.";
constexpr int64_t kLegacyEos = 2;  // of configs written before transformers 4.30
// The end of a text is found by comparing id * positions + position in float32.
constexpr int64_t kMostRank = int64_t{1} << 24;

}  // namespace

// ---------------------------------------------------------------- configuration

namespace {

template <class C, class Fields>
void VisitFields(C& c, Fields& fields) {
  fields.Only("model_type", "clip_text_model");
  fields.Only("architectures", {kOwner});
  fields.Field("vocab_size", c.vocab_size);
  fields.Field("hidden_size", c.hidden_size);
  fields.Field("intermediate_size", c.intermediate_size);
  fields.Field("num_hidden_layers", c.num_hidden_layers);
  fields.Field("num_attention_heads", c.num_attention_heads);
  fields.Field("max_position_embeddings", c.max_position_embeddings);
  fields.Field("hidden_act", c.hidden_act);
  fields.Field("layer_norm_eps", c.layer_norm_eps);
  fields.Field("bos_token_id", c.bos_token_id);
  fields.Field("eos_token_id", c.eos_token_id);
  fields.Field("pad_token_id", c.pad_token_id);
  fields.Field("projection_dim", c.projection_dim);
  fields.Only("attention_dropout", 0.0);
  fields.Only("dropout", 0.0);
  fields.Ignore("initializer_factor", 1.0);
  fields.Ignore("initializer_range", 0.02);
  fields.Ignore("torch_dtype", "float32");
  fields.Ignore("dtype");
  fields.Ignore("transformers_version");
}

}  // namespace

CLIPTextConfig CLIPTextConfig::FromJson(std::string_view text) {
  CLIPTextConfig c;
  JsonFields fields(kOwner, text);
  VisitFields(c, fields);
  fields.CheckAllRead();
  c.Validate();
  return c;
}

std::string CLIPTextConfig::ToJson() const {
  JsonWriter writer;
  VisitFields(*this, writer);
  return writer.Text();
}

void CLIPTextConfig::Validate() const {
  for (auto [field, value] :
       {std::pair("vocab_size", vocab_size), std::pair("hidden_size", hidden_size),
        std::pair("intermediate_size", intermediate_size),
        std::pair("num_hidden_layers", num_hidden_layers),
        std::pair("num_attention_heads", num_attention_heads),
        std::pair("max_position_embeddings", max_position_embeddings)}) {
    Check(value > 0, "{}: field '{}' is {}, must be positive", kOwner, field, value);
  }
  Check(hidden_size % num_attention_heads == 0,
        "{}: num_attention_heads {} must divide hidden_size {}", kOwner, num_attention_heads,
        hidden_size);
  Check(layer_norm_eps >= 0, "{}: field 'layer_norm_eps' is {}, must not be negative", kOwner,
        layer_norm_eps);
  Check(eos_token_id >= 0 && eos_token_id < vocab_size,
        "{}: field 'eos_token_id' is {}, must be in [0, {})", kOwner, eos_token_id, vocab_size);
  Check<UnsupportedError>(
      CheckedMul(vocab_size, max_position_embeddings, kOwner.data()) <= kMostRank,
      "{}: vocab_size {} times max_position_embeddings {} must be at most 2^24", kOwner, vocab_size,
      max_position_embeddings);
  CheckActivation(hidden_act);
}

// ---------------------------------------------------------------- the model

namespace nn {

CLIPEncoderLayer::CLIPEncoderLayer(const CLIPTextConfig& c)
    : Layer("CLIPEncoderLayer"), heads_(c.num_attention_heads), act_(c.hidden_act) {
  int64_t width = c.hidden_size;
  auto linear = [&](const char* name, int64_t in, int64_t out) {
    return AddLayer<Linear>(name, Linear::Options{in, out});
  };
  k_proj_ = linear("self_attn.k_proj", width, width);
  v_proj_ = linear("self_attn.v_proj", width, width);
  q_proj_ = linear("self_attn.q_proj", width, width);
  out_proj_ = linear("self_attn.out_proj", width, width);
  layer_norm1_ = AddLayer<LayerNorm>("layer_norm1", LayerNorm::Options{width, c.layer_norm_eps});
  fc1_ = linear("mlp.fc1", width, c.intermediate_size);
  fc2_ = linear("mlp.fc2", c.intermediate_size, width);
  layer_norm2_ = AddLayer<LayerNorm>("layer_norm2", LayerNorm::Options{width, c.layer_norm_eps});
}

std::vector<Value> CLIPEncoderLayer::ExportComputationGraph(ComputationGraph&,
                                                            std::span<const Value> inputs) {
  Value x = Required(inputs, 0, "hidden_states"), mask = Optional(inputs, 1);
  Value h = layer_norm1_->Call(x);
  Value q = q_proj_->Call(h), k = k_proj_->Call(h), v = v_proj_->Call(h);
  double width = static_cast<double>(q.dim(2)) / static_cast<double>(heads_);
  AttentionOptions options{.heads = heads_, .scale = 1 / std::sqrt(width), .causal = true};
  x = x + out_proj_->Call(calotype::Attention(q, k, v, options, mask).out);
  return {x + fc2_->Call(Activate(act_, fc1_->Call(layer_norm2_->Call(x))))};
}

}  // namespace nn

CLIPTextModel::CLIPTextModel(const CLIPTextConfig& config) : Layer(kOwner), config_(config) {
  const CLIPTextConfig& c = config_;
  c.Validate();
  token_embedding_ = AddLayer<nn::Embedding>("text_model.embeddings.token_embedding",
                                             nn::Embedding::Options{c.vocab_size, c.hidden_size});
  position_embedding_ =
      AddLayer<nn::Embedding>("text_model.embeddings.position_embedding",
                              nn::Embedding::Options{c.max_position_embeddings, c.hidden_size});
  for (int64_t i = 0; i < c.num_hidden_layers; ++i) {
    layers_.push_back(
        AddLayer<nn::CLIPEncoderLayer>(fmt::format("text_model.encoder.layers.{}", i), c));
  }
  final_layer_norm_ = AddLayer<nn::LayerNorm>(
      "text_model.final_layer_norm", nn::LayerNorm::Options{c.hidden_size, c.layer_norm_eps});
}

void CLIPTextModel::SetClipSkip(int64_t clip_skip) {
  Check(clip_skip >= 0 && clip_skip < config_.num_hidden_layers,
        "{}: clip_skip {} must be in [0, {})", Describe(), clip_skip, config_.num_hidden_layers);
  if (clip_skip == clip_skip_) return;
  clip_skip_ = clip_skip;
  Changed();
}

int64_t CLIPTextModel::AddTokens(const std::string& name, const Tensor& embeddings) {
  const CLIPTextConfig& c = config_;
  Check<ShapeError>(embeddings.shape().rank() == 2 && embeddings.shape()[0] > 0 &&
                        embeddings.shape()[1] == c.hidden_size && embeddings.dtype() == DType::kF32,
                    "{}: embeddings {} to add must be f32 [n, {}]", Describe(), embeddings.type(),
                    c.hidden_size);
  int64_t first = c.vocab_size;
  for (const ParameterPtr& added : added_tokens_) first += added->value().shape()[0];
  Check<UnsupportedError>((first + embeddings.shape()[0]) * c.max_position_embeddings <= kMostRank,
                          "{}: {} tokens behind {} are too many", Describe(), embeddings.shape()[0],
                          first);
  added_tokens_.push_back(std::make_shared<Parameter>(name, embeddings.Clone()));
  Changed();
  return first;
}

Tensor CLIPTextModel::EmbeddingOf(int64_t id) {
  Check(id >= 0 && id < config_.vocab_size, "{}: the token {} is not in [0, {})", Describe(), id,
        config_.vocab_size);
  Tensor embedding({config_.hidden_size});
  const float* from =
      token_embedding_->FindParameter("weight")->value().data() + id * config_.hidden_size;
  std::copy_n(from, config_.hidden_size, embedding.data());
  return embedding;
}

CLIPTextModel::Output CLIPTextModel::Build(Value ids, Value attention_mask) {
  Check<ShapeError>(
      ids.rank() == 2 && ids.dim(1) > 0 && ids.dim(1) <= config_.max_position_embeddings,
      "{}: ids {} must be [B, T] with T from 1 to {}", Describe(), ids.shape(),
      config_.max_position_embeddings);
  ComputationGraph& graph = *ids.graph;
  int64_t tokens = ids.dim(1);
  Value mask;
  if (attention_mask.defined()) {
    Check<ShapeError>(attention_mask.shape() == ids.shape(),
                      "{}: attention_mask {} must have the shape of ids {}", Describe(),
                      attention_mask.shape(), ids.shape());
    mask = Reshape(nn::MaskToBias(attention_mask), {ids.dim(0), 1, 1, tokens});
  }
  std::vector<int64_t> positions;
  std::vector<float> from_end;
  for (int64_t i = 0; i < tokens; ++i) {
    positions.push_back(i);
    from_end.push_back(static_cast<float>(tokens - 1 - i));
  }
  Output output;
  Value x = token_embedding_->Call(ids);
  if (!added_tokens_.empty()) {
    std::vector<Value> tables{graph.ParameterLeaf(token_embedding_->FindParameter("weight"))};
    for (const ParameterPtr& added : added_tokens_) tables.push_back(graph.ParameterLeaf(added));
    x = Gather(Concat(tables, 0), ids);
  }
  x = x + position_embedding_->Call(graph.Constant(Tensor::From({tokens}, positions)));
  output.hidden_states.push_back(x);
  for (nn::CLIPEncoderLayer* layer : layers_) {
    x = layer->Call({x, mask});
    output.hidden_states.push_back(x);
  }
  Value last = final_layer_norm_->Call(x);
  output.last_hidden_state =
      clip_skip_ == 0 ? last
                      : final_layer_norm_->Call(
                            output.hidden_states[layers_.size() - static_cast<size_t>(clip_skip_)]);

  // The end of a text is where this is largest: the wanted id, and of equal ones the first. The
  // values of a row differ from each other, so exactly one is the largest.
  Value wanted = Cast(ids);
  if (config_.eos_token_id != kLegacyEos) {
    wanted = Equals(wanted, static_cast<float>(config_.eos_token_id));
  }
  Value rank =
      wanted * static_cast<float>(tokens) + graph.Constant(Tensor::From({1, tokens}, from_end));
  Value here = Equals(rank, Max(rank, {1}, true));
  output.pooler_output = Sum(Reshape(here, {ids.dim(0), tokens, 1}) * last, {1});
  return output;
}

std::vector<Value> CLIPTextModel::ExportComputationGraph(ComputationGraph&,
                                                         std::span<const Value> inputs) {
  Output output = Build(Required(inputs, 0, "ids"), Optional(inputs, 1));
  return {output.last_hidden_state, output.pooler_output};
}

std::map<std::string, Tensor> CLIPTextModel::CurrentNames(std::map<std::string, Tensor> tensors) {
  tensors.erase("text_model.embeddings.position_ids");
  tensors.erase("embeddings.position_ids");
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with(kPrefix)) return tensors;
  }
  std::map<std::string, Tensor> renamed;
  for (auto& [name, tensor] : tensors) {
    renamed.emplace(std::string(kPrefix) + name, std::move(tensor));
  }
  return renamed;
}

}  // namespace calotype
