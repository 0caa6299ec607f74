// Golden fixtures: outputs and gradients of diffusers and PyTorch against eager and compiled code.
// The cases are discovered in the folder CALOTYPE_FIXTURES (default: tests/fixtures; format and
// tolerances: its README.md); one test for each case and back end. A kind, processor or scheduler
// type that is not supported is skipped by name; a malformed case fails.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "core/json.h"
#include "diffusion/noise_schedule.h"
#include "diffusion/scheduler.h"
#include "graph/functions.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "layers/attention.h"
#include "layers/diffusion_cross_attention.h"
#include "layers/feed_forward.h"
#include "layers/flash_attention_layer.h"
#include "layers/resample.h"
#include "layers/resnet.h"
#include "layers/timesteps.h"
#include "layers/transformer.h"
#include "optim/optimizer.h"
#include "pipelines/graph_runner.h"
#include "pipelines/model_folder.h"
#include "pipelines/training_graph.h"

namespace calotype {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Tensors = std::map<std::string, Tensor>;

// What a case of an unsupported kind, processor or scheduler type ends with.
struct Unsupported {
  std::string name;
};

struct Tolerance {
  double output, gradient, gradient_floor;
};
constexpr Tolerance kLayerTolerance{2e-6, 3e-5, 1e-6}, kModelTolerance{8e-6, 3e-4, 1e-6};
constexpr double kSchedulerTolerance = 1e-4, kLossTolerance = 1e-5, kMovementTolerance = 1e-2;

// --- Cases.

fs::path FixtureFolder() {
  const char* folder = std::getenv("CALOTYPE_FIXTURES");
  return folder && *folder ? fs::path(folder) : fs::path(CALOTYPE_TEST_DATA) / "fixtures";
}

// Folders with a case.json, at any depth; loose files are ignored.
std::vector<fs::path> DiscoverCases() {
  std::vector<fs::path> cases;
  std::error_code error;
  for (fs::recursive_directory_iterator i(FixtureFolder(), error), end; !error && i != end;
       i.increment(error)) {
    if (i->is_regular_file() && i->path().filename() == "case.json")
      cases.push_back(i->path().parent_path());
  }
  std::sort(cases.begin(), cases.end());
  return cases;
}

struct Case {
  explicit Case(const fs::path& folder) : folder(folder) {
    document = ParseJson(ReadFile(folder / "case.json"));
    kind = document.at("kind");
    config = document.value("config", json::object());
    if (fs::exists(folder / "tensors.safetensors"))
      tensors = ReadSafetensors(folder / "tensors.safetensors").tensors;
  }
  // The tensors whose names start with `prefix`, under the rest of their names.
  Tensors With(const std::string& prefix) const {
    Tensors found;
    for (const auto& [name, tensor] : tensors) {
      if (name.rfind(prefix, 0) == 0) found[name.substr(prefix.size())] = tensor;
    }
    return found;
  }
  const Tensor& At(const std::string& name) const {
    auto found = tensors.find(name);
    if (found == tensors.end()) throw std::runtime_error("the case has no tensor " + name);
    return found->second;
  }

  fs::path folder;
  json document, config;
  std::string kind;
  Tensors tensors;
};

// --- Comparison.

double Largest(const Tensor& tensor) {
  Tensor wide = tensor.To(DType::kF64);
  double largest = 0;
  for (double v : wide.values<double>()) largest = std::max(largest, std::abs(v));
  return largest;
}

double LargestDifference(const Tensor& actual, const Tensor& expected) {
  Tensor a = actual.To(DType::kF64), b = expected.To(DType::kF64);
  double largest = 0;
  for (int64_t i = 0; i < a.elements(); ++i) {
    double difference = std::abs(a.data<double>()[i] - b.data<double>()[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN stays
    if (std::isnan(difference)) return difference;
  }
  return largest;
}

// Worst error of a case in units of its bound; printed by the test.
struct Worst {
  void Compare(const std::string& what, const Tensor& actual, const Tensor& expected,
               double bound) {
    ASSERT_EQ(actual.shape(), expected.shape()) << what;
    double error = LargestDifference(actual, expected);
    EXPECT_LE(error, bound) << what;
    Note(what, error, bound);
  }
  void Note(const std::string& what, double error, double bound) {
    double share = bound > 0 ? error / bound : error > 0 ? HUGE_VAL : 0;
    ++compared;
    if (!(share <= worst)) worst = share, name = what, worst_error = error;
  }
  int compared = 0;
  double worst = -1, worst_error = 0;
  std::string name;
};

// --- Layers and models: outputs and the vector-Jacobian product with the cotangents.

// What a model builds from its inputs: all outputs that a case may expect, by name.
using Build =
    std::function<std::map<std::string, Value>(ComputationGraph&, const std::vector<Value>&)>;

// `order`: the case's names of the layer's inputs, in order; one that the case does not have is
// absent. Without `build` the layer's first output is `out`.
void CheckLayer(const Case& c, Backend backend, Layer& layer, const Tensors& parameters,
                const std::vector<std::string>& order, const Tolerance& tolerance, Worst& worst,
                const Build& build = {}) {
  layer.SetTrainingMode(false);
  if (!parameters.empty() || layer.ParameterCount() > 0) layer.LoadParameters(parameters);
  Tensors given = c.With("input."), expected = c.With("output."), cotangents = c.With("cotangent."),
          gradients = c.With("grad.");
  for (const auto& [name, tensor] : given) {
    ASSERT_TRUE(std::count(order.begin(), order.end(), name))
        << "input." << name << " is no input of a " << c.kind;
  }
  ASSERT_FALSE(expected.empty()) << "the case has no output";

  ComputationGraph graph;
  std::vector<Tensor> inputs;
  std::vector<Value> values, wrt;
  std::vector<std::string> wrt_names;
  for (const std::string& name : order) {
    auto found = given.find(name);
    if (found == given.end()) {
      values.push_back({});
      continue;
    }
    inputs.push_back(found->second);
    values.push_back(graph.Input(name, found->second.type()));
    if (found->second.dtype() == DType::kF32)
      wrt.push_back(values.back()), wrt_names.push_back("input." + name);
  }
  std::map<std::string, Value> built;
  if (build) {
    built = build(graph, values);
  } else {
    built["out"] = layer.ExportComputationGraph(graph, values)[0];
  }
  std::vector<Value> outputs;
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(built.count(name)) << "output." << name << " is no output of a " << c.kind;
    outputs.push_back(built[name]);
    graph.Output(name, built[name]);
  }

  if (!cotangents.empty()) {
    std::vector<Value> douts;
    for (const auto& [name, tensor] : expected) {
      ASSERT_TRUE(cotangents.count(name)) << "the case has no cotangent." << name;
      douts.push_back(graph.Input("cotangent." + name, cotangents.at(name).type()));
      inputs.push_back(cotangents.at(name));
    }
    for (const ParameterPtr& parameter : layer.NamedParameters()) {
      wrt.push_back(graph.ParameterLeaf(parameter));
      wrt_names.push_back("param." + parameter->name());
    }
    std::vector<Value> results = Gradients(outputs, douts, wrt);
    for (size_t i = 0; i < wrt.size(); ++i) graph.Output("grad." + wrt_names[i], results[i]);
  }

  std::vector<Tensor> results = GraphRunner(std::move(graph), backend).Run(inputs);
  size_t next = 0;
  for (const auto& [name, tensor] : expected) {
    worst.Compare("output." + name, results[next++], tensor, tolerance.output * Largest(tensor));
  }
  if (cotangents.empty()) {
    ASSERT_TRUE(gradients.empty()) << "gradients without a cotangent";
    return;
  }
  double largest = 0;
  for (const auto& [name, tensor] : gradients) largest = std::max(largest, Largest(tensor));
  for (size_t i = 0; i < wrt.size(); ++i) {
    auto found = gradients.find(wrt_names[i]);
    if (found == gradients.end()) {
      // Masks and the like have no expected gradient; every parameter has.
      EXPECT_NE(wrt_names[i].rfind("param.", 0), 0u) << "the case has no grad." << wrt_names[i];
      continue;
    }
    worst.Compare("grad." + wrt_names[i], results[next + i], found->second,
                  tolerance.gradient * Largest(found->second) + tolerance.gradient_floor * largest);
    gradients.erase(found);
  }
  for (const auto& [name, tensor] : gradients)
    ADD_FAILURE() << "grad." << name << " belongs to nothing";
}

// Reads the fields of a config into options; a field that nothing has asked for fails the case.
class Fields {
 public:
  explicit Fields(const json& config) : config_(config) {}
  template <class T>
  Fields& operator()(const char* name, T& option) {
    known_.insert(name);
    if (config_.contains(name) && !config_[name].is_null()) config_[name].get_to(option);
    return *this;
  }
  ~Fields() {
    for (const auto& [name, value] : config_.items()) {
      EXPECT_TRUE(known_.count(name)) << "config field `" << name << "` is not supported";
    }
  }

 private:
  const json& config_;
  std::set<std::string> known_;
};

// The processor `type` with the case's arguments.
nn::AttentionProcessor ProcessorOf(const Case& c, const std::string& type) {
  nn::AttentionProcessor processor = nn::MakeAttentionProcessor(type);
  json call = c.config.value("call", json::object());
  std::visit(
      [&](auto& p) {
        std::string ignored;
        Fields fields(c.config.at("processor")), call_fields(call);
        fields("type", ignored);
        if constexpr (requires { p.slice_size; }) fields("slice_size", p.slice_size);
        if constexpr (requires { p.batch_size; }) fields("batch_size", p.batch_size);
        if constexpr (requires { p.hidden_size; }) {
          fields("hidden_size", p.hidden_size)("cross_attention_dim", p.cross_attention_dim);
        }
        if constexpr (requires { p.train_kv; }) {
          fields("train_kv", p.train_kv)("train_q_out", p.train_q_out)("out_bias", p.out_bias)(
              "dropout", p.dropout);
        }
        if constexpr (requires { p.rank; }) {
          double alpha = 0;
          fields("rank", p.rank)("network_alpha", alpha);
          if (alpha != 0) p.network_alpha = alpha;
          call_fields("scale", p.scale);
        }
      },
      processor);
  return processor;
}

void RunAttentionProcessor(const Case& c, Backend backend, const std::string& type, Worst& worst) {
  SCOPED_TRACE(type);
  auto names = nn::AttentionProcessorNames();
  if (!std::count(names.begin(), names.end(), type)) throw Unsupported{"processor " + type};
  nn::Attention::Options o;
  Fields(c.config.at("attention"))("query_dim", o.query_dim)(
      "cross_attention_dim", o.cross_attention_dim)("heads", o.heads)("dim_head", o.dim_head)(
      "bias", o.bias)("upcast_attention", o.upcast_attention)("upcast_softmax", o.upcast_softmax)(
      "cross_attention_norm", o.cross_attention_norm)(
      "cross_attention_norm_num_groups", o.cross_attention_norm_num_groups)("qk_norm", o.qk_norm)(
      "norm_num_groups", o.norm_num_groups)("out_bias", o.out_bias)("scale_qk", o.scale_qk)(
      "eps", o.eps)("rescale_output_factor", o.rescale_output_factor)(
      "residual_connection", o.residual_connection)("out_dim", o.out_dim)(
      "added_kv_proj_dim", o.added_kv_proj_dim)("spatial_norm_dim", o.spatial_norm_dim)(
      "only_cross_attention", o.only_cross_attention);
  nn::Attention layer(o);
  if (type.starts_with("Fused")) layer.FuseProjections();
  layer.SetProcessor(ProcessorOf(c, type));
  CheckLayer(c, backend, layer, c.With("param."),
             {"hidden_states", "encoder_hidden_states", "attention_mask", "temb"}, kLayerTolerance,
             worst);
}

// Also the processors of which the case says that they give the same.
void RunAttention(const Case& c, Backend backend, Worst& worst) {
  std::vector<std::string> types = {c.config.at("processor").at("type")};
  for (const std::string& type : c.document.value("also_holds_for", std::vector<std::string>{})) {
    types.push_back(type);
  }
  for (const std::string& type : types) RunAttentionProcessor(c, backend, type, worst);
}

void RunResnet(const Case& c, Backend backend, Worst& worst) {
  nn::ResnetBlock2D::Options o;
  Fields(c.config)("in_channels", o.in_channels)("out_channels", o.out_channels)(
      "temb_channels", o.temb_channels)("groups", o.groups)("groups_out", o.groups_out)(
      "eps", o.eps)("non_linearity", o.non_linearity)("skip_time_act", o.skip_time_act)(
      "time_embedding_norm", o.time_embedding_norm)("output_scale_factor", o.output_scale_factor)(
      "up", o.up)("down", o.down)("conv_shortcut_bias", o.conv_shortcut_bias)(
      "conv_2d_out_channels", o.conv_2d_out_channels);
  if (c.config.contains("temb_channels") && c.config["temb_channels"].is_null())
    o.temb_channels = 0;
  nn::ResnetBlock2D layer(o);
  CheckLayer(c, backend, layer, c.With("param."), {"input_tensor", "temb"}, kLayerTolerance, worst);
}

void RunDownsample(const Case& c, Backend backend, Worst& worst) {
  nn::Downsample2D::Options o;
  Fields(c.config)("channels", o.channels)("use_conv", o.use_conv)("out_channels", o.out_channels)(
      "padding", o.padding)("name", o.name)("kernel_size", o.kernel_size)("bias", o.bias);
  nn::Downsample2D layer(o);
  CheckLayer(c, backend, layer, c.With("param."), {"hidden_states"}, kLayerTolerance, worst);
}

void RunUpsample(const Case& c, Backend backend, Worst& worst) {
  nn::Upsample2D::Options o;
  Fields(c.config)("channels", o.channels)("use_conv", o.use_conv)("out_channels", o.out_channels)(
      "name", o.name)("kernel_size", o.kernel_size)("padding", o.padding)("bias", o.bias);
  nn::Upsample2D layer(o);
  CheckLayer(c, backend, layer, c.With("param."), {"hidden_states"}, kLayerTolerance, worst);
}

void RunTransformer(const Case& c, Backend backend, Worst& worst) {
  nn::Transformer2DModel::Options o;
  Fields(c.config)("num_attention_heads", o.num_attention_heads)(
      "attention_head_dim", o.attention_head_dim)("in_channels", o.in_channels)(
      "out_channels", o.out_channels)("num_layers", o.num_layers)(
      "norm_num_groups", o.norm_num_groups)("cross_attention_dim", o.cross_attention_dim)(
      "attention_bias", o.attention_bias)("activation_fn", o.activation_fn)(
      "use_linear_projection", o.use_linear_projection)("only_cross_attention",
                                                        o.only_cross_attention)(
      "double_self_attention", o.double_self_attention)("upcast_attention", o.upcast_attention);
  nn::Transformer2DModel layer(o);
  CheckLayer(c, backend, layer, c.With("param."),
             {"hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"},
             kLayerTolerance, worst);
}

void RunTransformerBlock(const Case& c, Backend backend, Worst& worst) {
  nn::BasicTransformerBlock::Options o;
  Fields(c.config)("dim", o.dim)("num_attention_heads", o.num_attention_heads)(
      "attention_head_dim", o.attention_head_dim)("cross_attention_dim", o.cross_attention_dim)(
      "activation_fn", o.activation_fn)("attention_bias", o.attention_bias)("only_cross_attention",
                                                                            o.only_cross_attention)(
      "double_self_attention", o.double_self_attention)("norm_eps", o.norm_eps);
  nn::BasicTransformerBlock layer(o);
  CheckLayer(c, backend, layer, c.With("param."),
             {"hidden_states", "encoder_hidden_states", "attention_mask", "encoder_attention_mask"},
             kLayerTolerance, worst);
}

void RunFeedForward(const Case& c, Backend backend, Worst& worst) {
  nn::FeedForward::Options o;
  Fields(c.config)("dim", o.dim)("dim_out", o.dim_out)("mult", o.mult)(
      "activation_fn", o.activation_fn)("inner_dim", o.inner_dim)("bias", o.bias);
  nn::FeedForward layer(o);
  CheckLayer(c, backend, layer, c.With("param."), {"hidden_states"}, kLayerTolerance, worst);
}

void RunTimesteps(const Case& c, Backend backend, Worst& worst) {
  nn::Timesteps::Options o;
  Fields(c.config)("num_channels", o.num_channels)("flip_sin_to_cos", o.flip_sin_to_cos)(
      "downscale_freq_shift", o.downscale_freq_shift)("scale", o.scale);
  nn::Timesteps layer(o);
  CheckLayer(c, backend, layer, {}, {"timesteps"}, kLayerTolerance, worst);
}

void RunTimestepEmbedding(const Case& c, Backend backend, Worst& worst) {
  nn::TimestepEmbedding::Options o;
  Fields(c.config)("in_channels", o.in_channels)("time_embed_dim", o.time_embed_dim)(
      "act_fn", o.act_fn)("out_dim", o.out_dim)("post_act_fn", o.post_act_fn)("cond_proj_dim",
                                                                              o.cond_proj_dim);
  nn::TimestepEmbedding layer(o);
  CheckLayer(c, backend, layer, c.With("param."), {"sample", "condition"}, kLayerTolerance, worst);
}

void RunDiffusionCrossAttention(const Case& c, Backend backend, Worst& worst) {
  int64_t query_dim = 0, context_dim = 0, num_heads = 8, spatial_size = 64;
  Fields(c.config)("query_dim", query_dim)("context_dim", context_dim)("num_heads", num_heads)(
      "spatial_size", spatial_size);
  nn::DiffusionCrossAttention layer(query_dim, context_dim, num_heads, spatial_size);
  CheckLayer(c, backend, layer, c.With("param."), {"input", "context"}, kLayerTolerance, worst);
}

void RunFlashAttention(const Case& c, Backend backend, Worst& worst) {
  int64_t length = 0, width = 0, heads = 0;
  double scale = 0;
  nn::FlashAttentionConfig o;
  Fields(c.config)("sequence_length", length)("embedding_dimension", width)("head_count", heads)(
      "use_causal_mask", o.use_causal_mask)("scale_factor", scale);
  if (scale != 0) o.scale_factor = scale;
  nn::FlashAttentionLayer layer(length, width, heads, o);
  CheckLayer(c, backend, layer, c.With("param."), {"input"}, kLayerTolerance, worst);
}

void RunUNet(const Case& c, Backend backend, Worst& worst) {
  auto unet = LoadUNet(c.folder);
  if (c.config.contains("freeu")) {
    UNet2DConditionModel::FreeU freeu;
    Fields(c.config["freeu"])("s1", freeu.s1)("s2", freeu.s2)("b1", freeu.b1)("b2", freeu.b2);
    unet->SetFreeU(freeu);
  }
  std::vector<std::string> order = {
      "sample",         "timestep",     "encoder_hidden_states", "encoder_attention_mask",
      "attention_mask", "class_labels", "timestep_cond",         "mid_block_additional_residual"};
  for (const auto& [name, tensor] : c.With("input.down_block_additional_residuals."))
    order.push_back("down_block_additional_residuals." + name);
  CheckLayer(c, backend, *unet, unet->SaveParameters(), order, kModelTolerance, worst);
}

void RunAutoencoder(const Case& c, Backend backend, Worst& worst) {
  auto vae = LoadAutoencoderKL(c.folder);
  if (c.config.value("tiling", false)) vae->SetTiling(VaeTiling{});
  CheckLayer(c, backend, *vae, vae->SaveParameters(), {"sample"}, kModelTolerance, worst,
             [&](ComputationGraph& graph, const std::vector<Value>& inputs) {
               auto outputs = vae->ExportComputationGraph(graph, inputs);
               return std::map<std::string, Value>{{"decoded", outputs.at(0)},
                                                   {"latent_mean", outputs.at(1)},
                                                   {"latent_logvar", outputs.at(2)}};
             });
}

void RunCLIPTextModel(const Case& c, Backend backend, Worst& worst) {
  auto model = LoadCLIPTextModel(c.folder);
  CheckLayer(c, backend, *model, model->SaveParameters(), {"input_ids"}, kModelTolerance, worst,
             [&](ComputationGraph&, const std::vector<Value>& inputs) {
               CLIPTextModel::Output output = model->Build(inputs.at(0));
               return std::map<std::string, Value>{
                   {"last_hidden_state", output.last_hidden_state},
                   {"pooler_output", output.pooler_output},
                   {"hidden_state_m2", output.hidden_states.at(output.hidden_states.size() - 2)}};
             });
}

// No graph: both back ends give the same.
void RunCLIPTokenizer(const Case& c, Backend, Worst& worst) {
  auto tokenizer = LoadCLIPTokenizer(c.folder);
  for (const json& text : c.document.at("cases")) {
    std::string words = text.at("text");
    CLIPTokenizer::Encoded encoded = tokenizer->Encode(words);
    std::vector<int64_t> ids = tokenizer->Tokenize(words), expected = text.at("ids");
    ids.insert(ids.begin(), tokenizer->bos());
    ids.push_back(tokenizer->eos());
    EXPECT_EQ(ids, expected) << words;
    EXPECT_EQ(encoded.ids, text.at("padded77").get<std::vector<int64_t>>()) << words;
    worst.Note(words, 0, 1);
  }
}

// --- Schedulers.

SchedulerConfig SchedulerOf(const Case& c, const std::string& type) {
  json document = c.config;
  document["_class_name"] = type;
  document.erase("type");
  return ParseSchedulerConfig(JsonText(document));
}

// The deterministic run with the stand-in model of the notes, which the back end computes.
void RunScheduler(const Case& c, Backend backend, Worst& worst) {
  auto scheduler = MakeScheduler(SchedulerOf(c, c.config.at("type")));
  scheduler->SetTimesteps(c.document.at("steps"));
  int64_t calls = scheduler->size();
  worst.Compare("output.timesteps", Tensor::From({calls}, scheduler->timesteps()),
                c.At("output.timesteps"), 0);
  auto alphas = scheduler->noise_schedule().alphas_cumprod();
  worst.Compare("output.alphas_cumprod",
                Tensor::From({static_cast<int64_t>(alphas.size())}, alphas),
                c.At("output.alphas_cumprod"), kSchedulerTolerance);
  auto sigmas = scheduler->sigmas();
  ASSERT_EQ(c.tensors.count("output.sigmas"), sigmas.empty() ? 0u : 1u);
  if (!sigmas.empty()) {
    worst.Compare("output.sigmas", Tensor::From({static_cast<int64_t>(sigmas.size())}, sigmas),
                  c.At("output.sigmas"), kSchedulerTolerance);
  }

  Tensor x = c.At("output.initial");
  const Tensor& weight = c.At("input.model_weight");
  ComputationGraph graph;
  {
    Value w = graph.Input("model_weight", weight.type()), sample = graph.Input("sample", x.type());
    Value offset = graph.Input("offset", Shape{});
    Value pixels = Reshape(sample, Shape{x.shape()[0], x.shape()[1], x.shape()[2] * x.shape()[3]});
    graph.Output("out", 0.9f * Tanh(Reshape(MatMul(w, pixels), x.shape())) + offset);
  }
  GraphRunner model(std::move(graph), backend);
  for (int64_t i = 0; i < calls; ++i) {
    double t = scheduler->timesteps()[static_cast<size_t>(i)];
    std::vector<Tensor> inputs{weight, scheduler->ScaleModelInput(x, i),
                               Tensor::Scalar(static_cast<float>(0.001 * t / 1000))};
    Tensor model_output = model.Run(inputs)[0];
    x = scheduler->Step(model_output, i, x,
                        scheduler->NeedsNoise(i) ? Tensor::Zeros(x.shape()) : Tensor());
    std::string name = fmt::format("output.step_{:03}", i);
    worst.Compare(name, x, c.At(name), kSchedulerTolerance * Largest(c.At(name)));
  }
}

void RunAddNoise(const Case& c, Backend backend, Worst& worst) {
  NoiseSchedule schedule(SchedulerOf(c, c.config.at("type")));
  const Tensor &sample = c.At("input.sample"), &noise = c.At("input.noise"),
               &timesteps = c.At("input.timesteps");
  const Tensor &noisy = c.At("output.noisy"), &velocity = c.At("output.velocity");
  ComputationGraph graph;
  Value x = graph.Input("sample", sample.type()), n = graph.Input("noise", noise.type());
  Value t = graph.Input("timesteps", timesteps.type());
  graph.Output("noisy", schedule.AddNoise(x, n, t));
  graph.Output("velocity", schedule.Velocity(x, n, t));
  std::vector<Tensor> results =
      GraphRunner(std::move(graph), backend).Run(std::vector{sample, noise, timesteps});
  worst.Compare("output.noisy", results[0], noisy, kSchedulerTolerance * Largest(noisy));
  worst.Compare("output.velocity", results[1], velocity, kSchedulerTolerance * Largest(velocity));
  worst.Compare("output.noisy (tensors)", schedule.AddNoise(sample, noise, timesteps), noisy,
                kSchedulerTolerance * Largest(noisy));
  worst.Compare("output.velocity (tensors)", schedule.Velocity(sample, noise, timesteps), velocity,
                kSchedulerTolerance * Largest(velocity));
  auto alphas = schedule.alphas_cumprod();
  worst.Compare("output.alphas_cumprod",
                Tensor::From({static_cast<int64_t>(alphas.size())}, alphas),
                c.At("output.alphas_cumprod"), kSchedulerTolerance);
}

// --- Training.

Optimizer::Rule RuleOf(const json& config) {
  std::string type = config.at("type");
  if (type == "SGD") {
    return Sgd{.momentum = config.value("momentum", 0.0),
               .dampening = config.value("dampening", 0.0),
               .weight_decay = config.value("weight_decay", 0.0),
               .nesterov = config.value("nesterov", false)};
  }
  if (type != "AdamW") throw Unsupported{"optimizer " + type};
  std::vector<double> betas = config.value("betas", std::vector<double>{0.9, 0.999});
  return AdamW{.beta1 = betas.at(0),
               .beta2 = betas.at(1),
               .eps = config.value("eps", 1e-8),
               .weight_decay = config.value("weight_decay", 0.01)};
}

void RunTrain(const Case& c, Backend backend, Worst& worst) {
  const json& config = c.config.at("optimizer");
  std::set<std::string> known{"type",     "lr",        "betas",    "eps",          "weight_decay",
                              "momentum", "dampening", "nesterov", "max_grad_norm"};
  for (const auto& [name, value] : config.items())
    ASSERT_TRUE(known.count(name)) << "optimizer field `" << name << "`";
  auto unet = LoadUNet(c.folder);
  NoiseSchedule schedule(ParseSchedulerConfig(JsonText(c.config.at("scheduler")), "DDPMScheduler"));
  std::vector<ParameterPtr> parameters = unet->NamedParameters();
  std::map<std::string, Tensor> start;
  for (const ParameterPtr& parameter : parameters)
    start[parameter->name()] = parameter->value().Clone();
  Optimizer optimizer(RuleOf(config), parameters, config.value("max_grad_norm", 0.0));

  const std::vector<std::string> names{"sample", "noise", "timesteps", "encoder_hidden_states"};
  ComputationGraph graph;
  std::vector<Value> values;
  for (const std::string& name : names)
    values.push_back(graph.Input(name, c.At("input.0." + name).type()));
  Value loss = DenoisingLoss(schedule, values[0], values[1], values[2], [&](Value noisy) {
    std::vector<Value> inputs{noisy, values[2], values[3]};
    return unet->ExportComputationGraph(graph, inputs)[0];
  });
  ExportTrainingStep(loss, optimizer, nullptr);
  GraphRunner runner(std::move(graph), backend);

  int64_t steps = c.document.at("steps");
  Tensor losses = c.At("output.losses").To(DType::kF64);
  ASSERT_EQ(losses.elements(), steps);
  for (int64_t step = 0; step < steps; ++step) {
    std::vector<Tensor> inputs;
    for (const std::string& name : names)
      inputs.push_back(c.At(fmt::format("input.{}.{}", step, name)));
    for (Tensor& input : optimizer.Inputs(step + 1, config.at("lr")))
      inputs.push_back(std::move(input));
    double expected = losses.data<double>()[step], actual = runner.Run(inputs)[0].Item();
    EXPECT_LE(std::abs(actual - expected), kLossTolerance * std::abs(expected))
        << "loss of step " << step;
    worst.Note(fmt::format("loss of step {}", step), std::abs(actual - expected),
               kLossTolerance * std::abs(expected));
  }
  Tensors expected = c.With("output.param.");
  ASSERT_EQ(expected.size(), parameters.size());
  for (const ParameterPtr& parameter : parameters) {
    const std::string& name = parameter->name();
    ASSERT_TRUE(expected.count(name)) << "the case has no output.param." << name;
    double movement = LargestDifference(expected.at(name), start.at(name));
    worst.Compare("output.param." + name, parameter->value(), expected.at(name),
                  kMovementTolerance * movement);
  }
}

// --- The tests.

using Runner = void (*)(const Case&, Backend, Worst&);
const std::map<std::string, Runner> kRunners = {
    {"attention", RunAttention},
    {"ResnetBlock2D", RunResnet},
    {"Downsample2D", RunDownsample},
    {"Upsample2D", RunUpsample},
    {"Transformer2DModel", RunTransformer},
    {"BasicTransformerBlock", RunTransformerBlock},
    {"FeedForward", RunFeedForward},
    {"Timesteps", RunTimesteps},
    {"TimestepEmbedding", RunTimestepEmbedding},
    {"DiffusionCrossAttention", RunDiffusionCrossAttention},
    {"FlashAttentionLayer", RunFlashAttention},
    {"UNet2DConditionModel", RunUNet},
    {"AutoencoderKL", RunAutoencoder},
    {"CLIPTextModel", RunCLIPTextModel},
    {"CLIPTokenizer", RunCLIPTokenizer},
    {"train", RunTrain},
    {"scheduler", RunScheduler},
    {"add_noise", RunAddNoise},
};

struct TestParameter {
  fs::path folder;
  Backend backend;
};

std::vector<TestParameter> TestParameters() {
  std::vector<TestParameter> parameters;
  for (const fs::path& folder : DiscoverCases()) {
    for (Backend backend : {Backend::kEager, Backend::kJit})
      parameters.push_back({folder, backend});
  }
  return parameters;
}

std::string NameOf(const ::testing::TestParamInfo<TestParameter>& info) {
  std::string name = info.param.folder.lexically_relative(FixtureFolder()).string() + "/" +
                     std::string(NameOf(info.param.backend));
  for (char& character : name)
    character = std::isalnum(static_cast<unsigned char>(character)) ? character : '_';
  return name;
}

class Conformance : public ::testing::TestWithParam<TestParameter> {};

TEST_P(Conformance, MatchesTheFixture) {
  Worst worst;
  try {
    Case c(GetParam().folder);
    auto runner = kRunners.find(c.kind);
    if (runner == kRunners.end()) throw Unsupported{"kind " + c.kind};
    runner->second(c, GetParam().backend, worst);
  } catch (const Unsupported& unsupported) {
    // A case of one's own may wait for its kind; those of this repository do not.
    if (!std::getenv("CALOTYPE_FIXTURES")) FAIL() << "not supported: " << unsupported.name;
    GTEST_SKIP() << "not supported yet: " << unsupported.name;
  } catch (const std::exception& e) {
    FAIL() << GetParam().folder << ": " << e.what();
  }
  EXPECT_GT(worst.compared, 0) << "nothing was compared";
  fmt::print("worst of {:3}: {:8.2e}, {:5.1f} % of its bound ({})\n", worst.compared,
             worst.worst_error, 100 * worst.worst, worst.name);
}

INSTANTIATE_TEST_SUITE_P(Fixtures, Conformance, ::testing::ValuesIn(TestParameters()), NameOf);

// A case that is not found would not be missed: the numbers of the README, by family.
TEST(ConformanceTest, FindsAllCases) {
  std::map<std::string, int> found;
  for (const fs::path& folder : DiscoverCases()) {
    ++found[folder.lexically_relative(FixtureFolder()).begin()->string()];
  }
  if (std::getenv("CALOTYPE_FIXTURES")) {
    EXPECT_FALSE(found.empty()) << "no case.json below " << FixtureFolder();
    return;
  }
  const std::map<std::string, int> expected{{"attention", 40}, {"clip", 2},  {"layers", 7},
                                            {"parts", 18},     {"train", 3}, {"schedulers", 19},
                                            {"unet", 10},      {"vae", 2}};
  EXPECT_EQ(found, expected);
}

}  // namespace
}  // namespace calotype
