// What the attention processors build. Which kernel computes the scores follows from a processor's
// arguments and, as in diffusers, from its name; so does the kind of its projections.
#include "layers/attention_processors.h"

#include <algorithm>
#include <string>
#include <type_traits>

#include "core/random.h"
#include "graph/functions.h"
#include "layers/attention_math.h"
#include "layers/attention_processor_builder.h"

namespace calotype::nn {

namespace {

using Kind = AttentionKernel::Kind;
constexpr int64_t kSingleBlockKeys = 128;

template <class P>
constexpr bool kAdded = P::kName.find("AddedKV") != std::string_view::npos;
template <class P>
constexpr bool kCustom = P::kName.starts_with("CustomDiffusion");
template <class P>
constexpr bool kLora = P::kName.starts_with("LoRA");
template <class P>
constexpr bool kCrossFrame = std::is_same_v<P, CrossFrameAttnProcessor>;
template <class P>
constexpr bool kFusedProjections = std::is_same_v<P, FusedAttnProcessor2_0>;

template <class P>
AttentionKernel KernelOf(const P& p) {
  if constexpr (requires { p.slice_size; }) {
    return {.kind = Kind::kSliced, .slice_size = p.slice_size};
  } else if constexpr (P::kName.find("XFormers") != std::string_view::npos) {
    return {.kind = Kind::kXFormers, .op = p.attention_op};
  } else {
    return {.kind = P::kName.ends_with("2_0") ? Kind::kFused : Kind::kExplicit};
  }
}

// The default-constructed processors, in the order of the variant.
template <size_t... i>
std::vector<AttentionProcessor> All(std::index_sequence<i...>) {
  return {std::variant_alternative_t<i, AttentionProcessor>{}...};
}
const std::vector<AttentionProcessor>& All() {
  static const auto all = All(std::make_index_sequence<std::variant_size_v<AttentionProcessor>>());
  return all;
}

// Refuses options of the module that the processor would ignore.
void CheckIgnored(const Attention& attention, std::string_view name, bool norms, bool finish) {
  const Attention::Options& o = attention.options();
  auto refuse = [&](bool given, std::string_view option) {
    Check<UnsupportedError>(!given, "attention: {} ignores the module's {}", name, option);
  };
  if (norms) refuse(o.norm_num_groups > 0, "norm_num_groups");
  if (norms) refuse(o.spatial_norm_dim > 0, "spatial_norm_dim");
  if (finish) refuse(o.residual_connection, "residual_connection");
  if (finish) refuse(o.rescale_output_factor != 1, "rescale_output_factor");
}

// Errors: ValueError unless `given` is 0 or all of `actual`.
void CheckSize(std::string_view name, std::string_view argument, int64_t given,
               std::initializer_list<int64_t> actual) {
  for (int64_t size : actual) {
    Check(given == 0 || given == size, "{}: {} {} does not fit the module, which has {}", name,
          argument, given, size);
  }
}

template <class P>
std::vector<ProcessorLayer> CustomDiffusionLayers(const Attention& attention, const P& p) {
  const Attention::Options& o = attention.options();
  Check(p.dropout >= 0 && p.dropout < 1, "{}: dropout {} must be in [0, 1)", P::kName, p.dropout);
  Check(p.dropout == 0 || p.train_q_out,
        "{}: dropout {} has no effect without train_q_out; set the module's", P::kName, p.dropout);
  int64_t hidden = o.query_dim, inner = attention.inner_dim();
  int64_t out = o.out_dim > 0 ? o.out_dim : hidden;
  int64_t cross = o.cross_attention_dim > 0 ? o.cross_attention_dim : hidden;
  CheckSize(P::kName, "hidden_size", p.hidden_size, {hidden, inner, out});
  CheckSize(P::kName, "cross_attention_dim", p.cross_attention_dim, {cross});
  std::vector<ProcessorLayer> layers;
  if (p.train_kv) {
    layers.push_back({"to_k_custom_diffusion", {cross, inner, false}});
    layers.push_back({"to_v_custom_diffusion", {cross, inner, false}});
  }
  if (p.train_q_out) {
    layers.push_back({"to_q_custom_diffusion", {hidden, inner, false}});
    layers.push_back({"to_out_custom_diffusion.0", {inner, out, p.out_bias}});
  }
  return layers;
}

template <class P>
std::vector<ProcessorLayer> LoRALayers(const Attention& attention, const P& p) {
  const Attention::Options& o = attention.options();
  int64_t hidden = o.query_dim, inner = attention.inner_dim();
  int64_t out = o.out_dim > 0 ? o.out_dim : hidden;
  int64_t cross = o.cross_attention_dim > 0 ? o.cross_attention_dim : hidden;
  std::vector<ProcessorLayer> layers;
  auto add = [&](const char* name, int64_t in, int64_t width, int64_t rank) {
    Check(p.rank > 0 && rank >= 0, "{}: rank {} must be positive", P::kName,
          rank != 0 ? rank : p.rank);
    layers.push_back(
        {name,
         {},
         LoRALinearLayer::Options{in, width, rank > 0 ? rank : p.rank, p.network_alpha, p.scale}});
  };
  CheckSize(P::kName, "hidden_size", p.hidden_size, {inner});
  if constexpr (kAdded<P>) {
    CheckSize(P::kName, "cross_attention_dim", p.cross_attention_dim, {o.added_kv_proj_dim});
    add("to_q_lora", hidden, inner, 0);
    add("add_k_proj_lora", o.added_kv_proj_dim, inner, 0);
    add("add_v_proj_lora", o.added_kv_proj_dim, inner, 0);
    // There even where only_cross_attention leaves them without use, as in the files.
    add("to_k_lora", hidden, inner, 0);
    add("to_v_lora", hidden, inner, 0);
    add("to_out_lora", inner, out, 0);
  } else {
    CheckSize(P::kName, "cross_attention_dim", p.cross_attention_dim, {cross});
    CheckSize(P::kName, "q_hidden_size", p.q_hidden_size, {hidden, inner});
    CheckSize(P::kName, "v_hidden_size", p.v_hidden_size, {inner});
    CheckSize(P::kName, "out_hidden_size", p.out_hidden_size, {inner, out});
    add("to_q_lora", hidden, inner, p.q_rank);
    add("to_k_lora", cross, inner, 0);
    add("to_v_lora", cross, inner, p.v_rank);
    add("to_out_lora", inner, out, p.out_rank);
  }
  return layers;
}

}  // namespace

// ---------------------------------------------------------------- names and declarations

std::string_view NameOf(const AttentionProcessor& processor) {
  return std::visit([](const auto& p) { return std::string_view(p.kName); }, processor);
}

AttentionProcessor MakeAttentionProcessor(std::string_view name) {
  for (const AttentionProcessor& processor : All()) {
    if (NameOf(processor) == name) return processor;
  }
  Fail<UnsupportedError>("attention processor '{}' is not supported; known are {}", name,
                         fmt::join(AttentionProcessorNames(), ", "));
}

std::vector<std::string_view> AttentionProcessorNames() {
  std::vector<std::string_view> names;
  for (const AttentionProcessor& processor : All()) names.push_back(NameOf(processor));
  return names;
}

std::vector<ProcessorLayer> DeclareProcessor(const Attention& attention,
                                             const AttentionProcessor& processor) {
  return std::visit(
      [&]<class P>(const P& p) -> std::vector<ProcessorLayer> {
        const Attention::Options& o = attention.options();
        AttentionKernel kernel = KernelOf(p);
        if constexpr (kAdded<P>) {
          Check<UnsupportedError>(o.added_kv_proj_dim > 0 && o.norm_num_groups > 0,
                                  "attention: {} needs added_kv_proj_dim and norm_num_groups",
                                  P::kName);
          Check<UnsupportedError>(
              o.out_dim == 0 || o.out_dim == o.query_dim,
              "attention: {} adds its input, which needs out_dim {} = query_dim "
              "{}",
              P::kName, o.out_dim, o.query_dim);
          Check<UnsupportedError>(o.rescale_output_factor == 1,
                                  "attention: {} ignores the module's rescale_output_factor",
                                  P::kName);
        } else {
          Check<UnsupportedError>(
              o.added_kv_proj_dim == 0,
              "attention: {} ignores the module's added_kv_proj_dim; use one of "
              "the AddedKV processors",
              P::kName);
        }
        bool spatial = !kAdded<P> && kernel.kind != Kind::kSliced;
        if (std::is_same_v<P, SlicedAttnAddedKVProcessor>) spatial = true;
        Check<UnsupportedError>(spatial || o.spatial_norm_dim == 0,
                                "attention: {} ignores the module's spatial_norm_dim", P::kName);
        Check<UnsupportedError>(
            kernel.kind != Kind::kFused || o.scale_qk,
            "{} always scales by 1/sqrt(dim_head); use another one for scale_qk = false", P::kName);
        Check(kernel.kind != Kind::kSliced || kernel.slice_size > 0,
              "{}: slice_size {} must be positive", P::kName, kernel.slice_size);
        if constexpr (kCrossFrame<P> || kCustom<P>) CheckIgnored(attention, P::kName, true, true);
        if constexpr (kCrossFrame<P>) {
          Check(p.batch_size > 0, "{}: batch_size {} must be positive", P::kName, p.batch_size);
        }
        if constexpr (kFusedProjections<P>) {
          Check(attention.fused(), "{}: {} needs FuseProjections before", attention.path(),
                P::kName);
        }
        if constexpr (kCustom<P>) return CustomDiffusionLayers(attention, p);
        if constexpr (kLora<P>) return LoRALayers(attention, p);
        return {};
      },
      processor);
}

// ---------------------------------------------------------------- parts of all processors

Value AttentionProcessorBuilder::Build() {
  return std::visit(
      [&]<class P>(const P& p) {
        if constexpr (kAdded<P>) return AddedKV(KernelOf(p));
        if constexpr (kCrossFrame<P>) return CrossFrame(p.batch_size);
        if constexpr (kCustom<P>) return CustomDiffusion(KernelOf(p));
        if constexpr (kFusedProjections<P>) return FusedProjections();
        return Plain(KernelOf(p));
      },
      attention.processor_);
}

Value AttentionProcessorBuilder::Project(std::string_view name, Linear* base, Value x) {
  auto own = [&](std::string_view suffix) -> Layer* {
    auto it = attention.processor_layers_.find(fmt::format("{}{}", name, suffix));
    return it == attention.processor_layers_.end() ? nullptr : it->second;
  };
  for (const char* suffix : {"_custom_diffusion", "_custom_diffusion.0"}) {
    if (Layer* layer = own(suffix)) {
      Check(base->loras().empty(), "{}: {} replaces {}, whose low-rank terms would be ignored",
            attention.Describe(), NameOf(attention.processor_), base->path());
      return layer->Call(x);
    }
  }
  Value y = base->Call(x);
  if (Layer* lora = own("_lora")) y = y + lora->Call(x);
  return y;
}

Value AttentionProcessorBuilder::Query(Value tokens) {
  return attention.NormalizeHeads(attention.norm_q_, Project("to_q", attention.to_q_, tokens));
}
Value AttentionProcessorBuilder::Key(Value source) {
  return attention.NormalizeHeads(attention.norm_k_, Project("to_k", attention.to_k_, source));
}
Value AttentionProcessorBuilder::ValueOf(Value source) {
  return Project("to_v", attention.to_v_, source);
}
Value AttentionProcessorBuilder::Out(Value attended) {
  Value y = Project("to_out", attention.to_out_, attended);
  double dropout = std::visit(
      [&](const auto& p) {
        // A processor with a result of its own has a dropout of its own.
        if constexpr (requires { p.dropout; }) {
          if (p.train_q_out) return p.dropout;
        }
        return attention.options_.dropout;
      },
      attention.processor_);
  if (dropout == 0 || !attention.training()) return y;
  Check<ShapeError>(
      in.seed.defined(),
      "{}: a dropout of {} needs the input seed in training, which only a module that is "
      "called by itself can be given; in a U-Net it must be 0",
      attention.Describe(), dropout);
  auto drop = static_cast<float>(dropout);
  // Modules that share a seed drop different values.
  auto stream = static_cast<int64_t>(StreamOf(attention.path()) >> 1);
  Value keep = LessOrEqual(y.graph->Constant(drop), PhiloxUniform(in.seed, y.shape(), stream));
  return y * (keep / (1 - drop));
}

Value AttentionProcessorBuilder::Tokens() {
  Value x = in.hidden_states;
  if (attention.spatial_norm_) x = attention.spatial_norm_->Call({x, in.temb});
  GroupNorm* norm = attention.group_norm_;
  if (x.rank() == 4) {
    x = Reshape(x, {x.dim(0), x.dim(1), x.dim(2) * x.dim(3)});
    if (norm) x = norm->Call(x);
    return Permute(x, {0, 2, 1});
  }
  return norm ? Permute(norm->Call(Permute(x, {0, 2, 1})), {0, 2, 1}) : x;
}

Value AttentionProcessorBuilder::Source(Value tokens) {
  if (!in.encoder_hidden_states.defined()) return tokens;
  Value e = in.encoder_hidden_states;
  if (attention.norm_cross_layer_) e = attention.norm_cross_layer_->Call(e);
  if (attention.norm_cross_group_) {
    e = Permute(attention.norm_cross_group_->Call(Permute(e, {0, 2, 1})), {0, 2, 1});
  }
  return e;
}

Value AttentionProcessorBuilder::Mask(int64_t batch, int64_t tokens, int64_t keys,
                                      int64_t appended) {
  Value mask = in.attention_mask;
  if (!mask.defined()) return mask;
  int64_t heads = attention.options_.heads;
  Check<ShapeError>(mask.rank() == 3, "{}: attention_mask {} must be [B, 1 or T, S]",
                    attention.Describe(), mask.shape());
  // Masks are chosen, not learned; their gradient would be as large as the scores.
  mask = StopGradient(mask);
  Shape given = mask.shape();
  if (given[2] != keys && appended > 0) mask = Pad(mask, {0, 0, 0}, {0, 0, appended});
  bool per_head = given[0] == batch * heads && heads > 1;
  Check<ShapeError>((given[0] == batch || per_head) && (given[1] == 1 || given[1] == tokens) &&
                        mask.dim(2) == keys,
                    "{}: attention_mask {} must be [{} or {}, 1 or {}, {}] (batch, tokens, keys)",
                    attention.Describe(), given, batch, batch * heads, tokens, keys);
  return Reshape(mask, {batch, per_head ? heads : 1, given[1], keys});
}

Value AttentionProcessorBuilder::Attend(const AttentionKernel& kernel, Value q, Value k, Value v,
                                        Value mask) {
  int64_t heads = attention.options_.heads;
  double scale = attention.scale();
  const AttentionProbsHook& hook = attention.probs_hook_;
  if (hook.edit && (!hook.wants || hook.wants(q.dim(1), k.dim(1)))) {
    auto edit = [&](Value probs) {
      Value edited = hook.edit(probs);
      Check<ShapeError>(edited.defined() && edited.shape() == probs.shape(),
                        "{}: the hook made attention probabilities {} of {}; they must keep their "
                        "shape",
                        attention.Describe(),
                        edited.defined() ? edited.shape().ToString() : "that are undefined",
                        probs.shape());
      return edited;
    };
    return ExplicitAttention(q, k, v, heads, scale, mask, {.edit = edit}).out;
  }
  switch (kernel.kind) {
    case Kind::kExplicit:
      return ExplicitAttention(q, k, v, heads, scale, mask).out;
    case Kind::kSliced:
      return SlicedAttention(q, k, v, heads, scale, mask, kernel.slice_size);
    case Kind::kFused:
    case Kind::kXFormers:
      break;
  }
  AttentionOptions options{.heads = heads, .scale = scale};
  bool single = kernel.kind == Kind::kXFormers &&
                (kernel.op == AttentionOp::kSingleBlock ||
                 (kernel.op == AttentionOp::kAuto && k.dim(1) <= kSingleBlockKeys));
  if (single) options.block_kv = k.dim(1);
  return calotype::Attention(q, k, v, options, mask).out;
}

Value AttentionProcessorBuilder::Finish(Value y) {
  Value x = in.hidden_states;
  if (x.rank() == 4) y = TokensToPicture(y, x.dim(2), x.dim(3));
  if (attention.options_.residual_connection) y = y + x;
  double factor = attention.options_.rescale_output_factor;
  return factor != 1 ? y / static_cast<float>(factor) : y;
}

// ---------------------------------------------------------------- the processors

Value AttentionProcessorBuilder::Plain(const AttentionKernel& kernel) {
  Value tokens = Tokens(), source = Source(tokens);
  Value mask = Mask(tokens.dim(0), tokens.dim(1), source.dim(1), source.dim(1));
  return Finish(Out(Attend(kernel, Query(tokens), Key(source), ValueOf(source), mask)));
}

Value AttentionProcessorBuilder::FusedProjections() {
  bool cross = attention.options_.cross_attention_dim > 0;
  Check<ShapeError>(cross == in.encoder_hidden_states.defined(),
                    "{}: the fused projections of this module serve {}-attention only",
                    attention.Describe(), cross ? "cross" : "self");
  for (const Linear* replaced : {attention.to_q_, attention.to_k_, attention.to_v_}) {
    Check((cross && replaced == attention.to_q_) || replaced->loras().empty(),
          "{}: {} replaces {}, whose low-rank terms would be ignored", attention.Describe(),
          FusedAttnProcessor2_0::kName, replaced->path());
  }
  Value tokens = Tokens(), source = Source(tokens);
  Value mask = Mask(tokens.dim(0), tokens.dim(1), source.dim(1), source.dim(1));
  int64_t inner = attention.inner_dim();
  std::vector<Value> parts =
      Split(attention.fused_->Call(source), 2, std::vector<int64_t>(cross ? 2 : 3, inner));
  Value q = cross ? attention.to_q_->Call(tokens) : parts[0];
  q = attention.NormalizeHeads(attention.norm_q_, q);
  Value k = attention.NormalizeHeads(attention.norm_k_, parts[parts.size() - 2]);
  return Finish(Out(Attend({.kind = Kind::kFused}, q, k, parts.back(), mask)));
}

Value AttentionProcessorBuilder::AddedKV(const AttentionKernel& kernel) {
  Value x = in.hidden_states;
  if (attention.spatial_norm_) x = attention.spatial_norm_->Call({x, in.temb});
  if (x.rank() == 4) x = Reshape(x, {x.dim(0), x.dim(1), x.dim(2) * x.dim(3)});
  Value tokens = Permute(attention.group_norm_->Call(x), {0, 2, 1});
  Value source = Source(Permute(x, {0, 2, 1}));  // before the norm
  Value k = Project("add_k_proj", attention.add_k_proj_, source);
  Value v = Project("add_v_proj", attention.add_v_proj_, source);
  int64_t batch = x.dim(0), own = 0;
  if (!attention.options_.only_cross_attention) {
    own = tokens.dim(1);
    auto join = [&](Value added, Value self) {
      if (added.dim(0) != batch) {
        added = Broadcast(added, {batch, added.dim(1), added.dim(2)});
      }
      return Concat({added, self}, 1);
    };
    k = join(k, Project("to_k", attention.to_k_, tokens));
    v = join(v, ValueOf(tokens));
  }
  k = attention.NormalizeHeads(attention.norm_k_, k);
  Value mask = Mask(batch, tokens.dim(1), k.dim(1), own);
  Value y = Permute(Out(Attend(kernel, Query(tokens), k, v, mask)), {0, 2, 1});
  return Reshape(y, in.hidden_states.shape()) + in.hidden_states;
}

Value AttentionProcessorBuilder::CrossFrame(int64_t batch_size) {
  Value x = in.hidden_states;
  Check<ShapeError>(x.rank() == 3, "{}: {} needs hidden_states [B, T, C], not {}",
                    attention.Describe(), CrossFrameAttnProcessor::kName, x.shape());
  Value source = Source(x);
  Value mask = Mask(x.dim(0), x.dim(1), source.dim(1), source.dim(1));
  bool self = !in.encoder_hidden_states.defined();
  int64_t frames = x.dim(0) / batch_size;
  if (self) {
    Check<ShapeError>(frames * batch_size == x.dim(0),
                      "{}: {} frames in all are no multiple of the batch_size {} of {}",
                      attention.Describe(), x.dim(0), batch_size, CrossFrameAttnProcessor::kName);
    source = Slice(Reshape(x, {batch_size, frames, x.dim(1), x.dim(2)}), 1, 0, 1);
    source = Reshape(source, {batch_size, x.dim(1), x.dim(2)});
  }
  // Keys and values of the first frames, once for each frame.
  auto spread = [&](Value v) {
    if (!self) return v;
    int64_t tokens = v.dim(1), width = v.dim(2);
    v = Broadcast(Reshape(v, {batch_size, 1, tokens, width}), {batch_size, frames, tokens, width});
    return Reshape(v, {batch_size * frames, tokens, width});
  };
  return Out(Attend({}, Query(x), spread(Key(source)), spread(ValueOf(source)), mask));
}

Value AttentionProcessorBuilder::CustomDiffusion(const AttentionKernel& kernel) {
  Value x = in.hidden_states;
  Check<ShapeError>(x.rank() == 3, "{}: {} needs hidden_states [B, T, C], not {}",
                    attention.Describe(), NameOf(attention.processor_), x.shape());
  Value source = Source(x);
  Value mask = Mask(x.dim(0), x.dim(1), source.dim(1), source.dim(1));
  // Token 0, the start of the text, is the same in all texts and shall not learn.
  auto detach_first = [&](Value v) {
    if (!in.encoder_hidden_states.defined()) return v;
    Value first = StopGradient(Slice(v, 1, 0, 1));
    return v.dim(1) == 1 ? first : Concat({first, Slice(v, 1, 1, v.dim(1) - 1)}, 1);
  };
  return Out(
      Attend(kernel, Query(x), detach_first(Key(source)), detach_first(ValueOf(source)), mask));
}

}  // namespace calotype::nn
