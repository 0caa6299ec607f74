// CLIPTextModel of transformers: the text encoder of Stable Diffusion. Parameter names and shapes
// are those of its files ("text_model.encoder.layers.0..."), so they load by name. Radford et al.
// 2021, arXiv:2103.00020.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "layers/linear.h"
#include "layers/norm.h"

namespace calotype {

// The fields of config.json that matter. Defaults are transformers'.
struct CLIPTextConfig {
  int64_t vocab_size = 49408, hidden_size = 512, intermediate_size = 2048;
  int64_t num_hidden_layers = 12, num_attention_heads = 8;
  int64_t max_position_embeddings = 77;
  std::string hidden_act = "quick_gelu";  // or "gelu" (exact), ...: see Activate
  double layer_norm_eps = 1e-5;
  int64_t bos_token_id = 49406, eos_token_id = 49407, pad_token_id = 1;
  int64_t projection_dim = 512;  // of a projection that the text model does not have; information

  // Reads text_encoder/config.json. Errors: ValueError for text that is not JSON, a field of a
  // wrong type, an unknown field, and whatever Validate finds; UnsupportedError naming a field with
  // an unsupported value. Fields that only concern training from scratch by transformers
  // (initializer_*) and versions are skipped.
  static CLIPTextConfig FromJson(std::string_view text);
  std::string ToJson() const;
  void Validate() const;
  bool operator==(const CLIPTextConfig&) const = default;
};

namespace nn {

// x += out_proj(attention(layer_norm1(x))), token i sees tokens j <= i, scale 1/sqrt(head width);
// x += fc2(act(fc1(layer_norm2(x)))). x [B, T, hidden_size]; mask (optional) is added to the scores
// [B, heads, T, T].
class CLIPEncoderLayer : public Layer {
 public:
  explicit CLIPEncoderLayer(const CLIPTextConfig& config);
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

 private:
  int64_t heads_;
  std::string act_;
  LayerNorm *layer_norm1_, *layer_norm2_;
  Linear *q_proj_, *k_proj_, *v_proj_, *out_proj_, *fc1_, *fc2_;
};

}  // namespace nn

// Inputs: ids [B, T] (i32 or i64), T <= max_position_embeddings; attention_mask (optional) f32 [B,
// T], 1 for tokens to see and 0 for those that no token sees. Outputs: last_hidden_state [B, T,
// hidden_size], what a U-Net attends to, and pooler_output [B, hidden_size]. Padding is a token
// like others: it is not masked.
class CLIPTextModel : public Layer {
 public:
  // Errors: as CLIPTextConfig::Validate.
  explicit CLIPTextModel(const CLIPTextConfig& config);
  const CLIPTextConfig& config() const { return config_; }
  std::vector<Value> ExportComputationGraph(ComputationGraph& graph,
                                            std::span<const Value> inputs) override;

  struct Output {
    // token_embedding[ids] + position_embedding, then the result of each layer, none of them
    // normalised: num_hidden_layers + 1 values [B, T, hidden_size]
    std::vector<Value> hidden_states;
    // final_layer_norm(hidden_states[num_hidden_layers - clip_skip])
    Value last_hidden_state;
    // final_layer_norm(hidden_states.back()) at the end of each text: the first eos_token_id, or
    // the largest id where the config has the legacy eos_token_id 2; the first token if there is
    // none.
    Value pooler_output;
  };
  Output Build(Value ids, Value attention_mask = {});

  // Adds embeddings f32 [n, hidden_size] behind the vocabulary and those added before, and returns
  // the first of their ids; vocab_size of the config stays. They are a parameter of that name, so
  // that they train while the vocabulary does not. It is none of NamedParameters: no part of the
  // model's files. Errors: ShapeError; UnsupportedError beyond the bound of
  // CLIPTextConfig::Validate.
  int64_t AddTokens(const std::string& name, const Tensor& embeddings);
  // The parameters, one for each call.
  const std::vector<ParameterPtr>& added_tokens() const { return added_tokens_; }
  // The embedding of a token, [hidden_size]. Errors: ValueError unless 0 <= id < vocab_size.
  Tensor EmbeddingOf(int64_t id);

  // The number of last layers that last_hidden_state leaves out, as diffusers' clip_skip; 0 at
  // first. Errors: ValueError unless 0 <= clip_skip < num_hidden_layers.
  void SetClipSkip(int64_t clip_skip);
  int64_t clip_skip() const { return clip_skip_; }

  // The tensors of a file under this model's names: files of transformers from version 5 on lack
  // the prefix "text_model."; an old file's constant position_ids is left out.
  static std::map<std::string, Tensor> CurrentNames(std::map<std::string, Tensor> tensors);

 private:
  CLIPTextConfig config_;
  int64_t clip_skip_ = 0;
  nn::Embedding *token_embedding_, *position_embedding_;
  std::vector<ParameterPtr> added_tokens_;
  std::vector<nn::CLIPEncoderLayer*> layers_;
  nn::LayerNorm* final_layer_norm_;
};

}  // namespace calotype
