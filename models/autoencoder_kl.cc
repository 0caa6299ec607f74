#include "models/autoencoder_kl.h"

#include <algorithm>
#include <utility>

#include "graph/functions.h"
#include "layers/activation.h"
#include "models/json_fields.h"

namespace calotype {

namespace {

constexpr std::string_view kOwner = "AutoencoderKL";

nn::VaeOptions Options(const AutoencoderKLConfig& c, int64_t in, int64_t out) {
  return {.in_channels = in,
          .out_channels = out,
          .block_out_channels = c.block_out_channels,
          .layers_per_block = c.layers_per_block,
          .norm_num_groups = c.norm_num_groups,
          .act_fn = c.act_fn,
          .mid_block_add_attention = c.mid_block_add_attention};
}

// b with its first rows (axis 2) or columns (axis 3) faded in over the last ones of a: element y of
// the band is a (1 - y / band) + b y / band.
Value Blend(Value a, Value b, int axis, int64_t band) {
  band = std::min({band, a.dim(axis), b.dim(axis)});
  if (band == 0) return b;
  std::vector<float> weights(static_cast<size_t>(band));
  for (int64_t y = 0; y < band; ++y) {
    weights[static_cast<size_t>(y)] = static_cast<float>(y) / static_cast<float>(band);
  }
  Shape shape = axis == 2 ? Shape{1, 1, band, 1} : Shape{1, 1, 1, band};
  Value w = b.graph->Constant(Tensor::From(shape, weights));
  Value mixed = Slice(a, axis, a.dim(axis) - band, band) * (1.0f - w) + Slice(b, axis, 0, band) * w;
  if (band == b.dim(axis)) return mixed;
  return Concat({mixed, Slice(b, axis, band, b.dim(axis) - band)}, axis);
}

}  // namespace

// ---------------------------------------------------------------- configuration

namespace {

template <class C, class Fields>
void VisitFields(C& c, Fields& fields) {
  fields.Only("_class_name", kOwner);
  fields.Ignore("_diffusers_version", kDiffusersVersion);
  fields.Field("in_channels", c.in_channels);
  fields.Field("out_channels", c.out_channels);
  fields.Field("down_block_types", c.down_block_types);
  fields.Field("up_block_types", c.up_block_types);
  fields.Field("block_out_channels", c.block_out_channels);
  fields.Field("layers_per_block", c.layers_per_block);
  fields.Field("act_fn", c.act_fn);
  fields.Field("latent_channels", c.latent_channels);
  fields.Field("norm_num_groups", c.norm_num_groups);
  fields.Field("sample_size", c.sample_size);
  fields.Field("scaling_factor", c.scaling_factor);
  fields.Field("shift_factor", c.shift_factor);
  fields.Only("latents_mean", nullptr);
  fields.Only("latents_std", nullptr);
  fields.Field("force_upcast", c.force_upcast);
  fields.Field("use_quant_conv", c.use_quant_conv);
  fields.Field("use_post_quant_conv", c.use_post_quant_conv);
  fields.Field("mid_block_add_attention", c.mid_block_add_attention);
}

}  // namespace

AutoencoderKLConfig AutoencoderKLConfig::FromJson(std::string_view text) {
  AutoencoderKLConfig c;
  JsonFields fields(kOwner, text);
  VisitFields(c, fields);
  fields.CheckAllRead();
  c.Validate();
  return c;
}

std::string AutoencoderKLConfig::ToJson() const {
  JsonWriter writer;
  VisitFields(*this, writer);
  return writer.Text();
}

void AutoencoderKLConfig::Validate() const {
  auto positive = [](std::string_view field, int64_t value) {
    Check(value > 0, "{}: field '{}' is {}, must be positive", kOwner, field, value);
  };
  positive("in_channels", in_channels);
  positive("out_channels", out_channels);
  positive("layers_per_block", layers_per_block);
  positive("latent_channels", latent_channels);
  positive("norm_num_groups", norm_num_groups);
  positive("sample_size", sample_size);
  Check(scaling_factor > 0, "{}: field 'scaling_factor' is {}, must be positive", kOwner,
        scaling_factor);
  CheckActivation(act_fn);
  size_t blocks = block_out_channels.size();
  Check(blocks > 0 && blocks <= 16,
        "{}: field 'block_out_channels' has {} entries, expected 1 to 16", kOwner, blocks);
  auto types = [&](std::string_view field, const std::vector<std::string>& list,
                   std::string_view known) {
    Check(list.size() == blocks, "{}: field '{}' has {} entries, block_out_channels {}", kOwner,
          field, list.size(), blocks);
    for (const std::string& type : list) {
      Check<UnsupportedError>(type == known,
                              "{}: field '{}' names '{}', which is not supported; known: {}",
                              kOwner, field, type, known);
    }
  };
  types("down_block_types", down_block_types, "DownEncoderBlock2D");
  types("up_block_types", up_block_types, "UpDecoderBlock2D");
  for (size_t i = 0; i < blocks; ++i) {
    positive("block_out_channels", block_out_channels[i]);
    Check(block_out_channels[i] % norm_num_groups == 0,
          "{}: norm_num_groups {} must divide block_out_channels {} (block {})", kOwner,
          norm_num_groups, block_out_channels[i], i);
  }
}

// ---------------------------------------------------------------- the model

Value LatentDistribution::Sample(Value noise) const {
  Check<ShapeError>(noise.shape() == mean.shape(), "latents: noise {} must have the shape {}",
                    noise.shape(), mean.shape());
  return mean + Exp(0.5f * logvar) * noise;
}

Value LatentDistribution::KlDivergence() const {
  return 0.5f * Sum(Square(mean) + Exp(logvar) - 1.0f - logvar, {1, 2, 3});
}

AutoencoderKL::AutoencoderKL(const AutoencoderKLConfig& config) : Layer(kOwner), config_(config) {
  const AutoencoderKLConfig& c = config_;
  c.Validate();
  encoder_ = AddLayer<nn::VaeEncoder>("encoder", Options(c, c.in_channels, 2 * c.latent_channels));
  decoder_ = AddLayer<nn::VaeDecoder>("decoder", Options(c, c.latent_channels, c.out_channels));
  auto pointwise = [&](const char* name, int64_t channels) {
    return AddLayer<nn::Conv2d>(name, nn::Conv2d::Options{channels, channels, 1});
  };
  if (c.use_quant_conv) quant_conv_ = pointwise("quant_conv", 2 * c.latent_channels);
  if (c.use_post_quant_conv) post_quant_conv_ = pointwise("post_quant_conv", c.latent_channels);
}

void AutoencoderKL::SetTiling(const std::optional<VaeTiling>& tiling) {
  if (!tiling) {
    encode_tiles_.reset();
    decode_tiles_.reset();
    Changed();
    return;
  }
  int64_t factor = config_.Factor();
  int64_t pixels = tiling->sample_size > 0 ? tiling->sample_size : config_.sample_size;
  int64_t latents = pixels / factor;
  Check(tiling->overlap >= 0 && tiling->overlap <= 0.5, "{}: tile overlap {} must be in [0, 0.5]",
        kOwner, tiling->overlap);
  auto part = [](int64_t size, double share) {
    return static_cast<int64_t>(static_cast<double>(size) * share);
  };
  const Tiles encode{pixels, part(pixels, 1 - tiling->overlap), part(latents, tiling->overlap),
                     latents - part(latents, tiling->overlap)};
  const Tiles decode{latents, part(latents, 1 - tiling->overlap), part(pixels, tiling->overlap),
                     pixels - part(pixels, tiling->overlap)};
  Check(
      latents > 0 && encode.stride == factor * encode.limit &&
          factor * decode.stride == decode.limit,
      "{}: tiles of {} pixels with overlap {} do not fit together; {} pixels make one latent, and "
      "tile and band must be multiples of it",
      kOwner, pixels, tiling->overlap, factor);
  encode_tiles_ = encode;
  decode_tiles_ = decode;
  Changed();
}

// Applies a network to overlapping tiles of x and joins the results as diffusers does: each tile is
// blended with the (already blended) ones above and to the left, then cut to its own part.
template <class F>
Value AutoencoderKL::Tiled(Value x, const Tiles& tiles, const F& apply) {
  std::vector<Value> above, rows;
  for (int64_t i = 0; i < x.dim(2); i += tiles.stride) {
    std::vector<Value> row, parts;
    Value band = Slice(x, 2, i, std::min(tiles.size, x.dim(2) - i));
    for (int64_t j = 0; j < x.dim(3); j += tiles.stride) {
      Value tile = apply(Slice(band, 3, j, std::min(tiles.size, x.dim(3) - j)));
      if (!above.empty()) tile = Blend(above[row.size()], tile, 2, tiles.band);
      if (!row.empty()) tile = Blend(row.back(), tile, 3, tiles.band);
      row.push_back(tile);
      tile = Slice(tile, 2, 0, std::min(tiles.limit, tile.dim(2)));
      parts.push_back(Slice(tile, 3, 0, std::min(tiles.limit, tile.dim(3))));
    }
    rows.push_back(Concat(parts, 3));
    above = std::move(row);
  }
  return Concat(rows, 2);
}

Value AutoencoderKL::Moments(Value x) {
  auto encode = [&](Value v) {
    v = encoder_->Call(v);
    return quant_conv_ ? quant_conv_->Call(v) : v;
  };
  bool tiled = encode_tiles_ && std::max(x.dim(2), x.dim(3)) > encode_tiles_->size;
  return tiled ? Tiled(x, *encode_tiles_, encode) : encode(x);
}

LatentDistribution AutoencoderKL::Encode(Value x) {
  Check<ShapeError>(x.rank() == 4 && x.dim(1) == config_.in_channels &&
                        std::min(x.dim(2), x.dim(3)) >= config_.Factor(),
                    "{}: sample {} must be [B, {}, H, W] with sides of at least {}", Describe(),
                    x.shape(), config_.in_channels, config_.Factor());
  Value moments = Moments(x);
  int64_t channels = config_.latent_channels;
  Value logvar = Slice(moments, 1, channels, channels);
  return {Slice(moments, 1, 0, channels), Minimum(Maximum(logvar, -30.0f), 20.0f)};
}

Value AutoencoderKL::Decode(Value z) {
  Check<ShapeError>(z.rank() == 4 && z.dim(1) == config_.latent_channels,
                    "{}: latents {} must be [B, {}, h, w]", Describe(), z.shape(),
                    config_.latent_channels);
  auto decode = [&](Value v) {
    return decoder_->Call(post_quant_conv_ ? post_quant_conv_->Call(v) : v);
  };
  bool tiled = decode_tiles_ && std::max(z.dim(2), z.dim(3)) > decode_tiles_->size;
  return tiled ? Tiled(z, *decode_tiles_, decode) : decode(z);
}

Value AutoencoderKL::ScaleLatents(Value z) const {
  if (config_.shift_factor) z = z - static_cast<float>(*config_.shift_factor);
  return z * static_cast<float>(config_.scaling_factor);
}

Value AutoencoderKL::UnscaleLatents(Value latents) const {
  Value z = latents / static_cast<float>(config_.scaling_factor);
  return config_.shift_factor ? z + static_cast<float>(*config_.shift_factor) : z;
}

std::vector<Value> AutoencoderKL::ExportComputationGraph(ComputationGraph&,
                                                         std::span<const Value> inputs) {
  LatentDistribution latents = Encode(Required(inputs, 0, "sample"));
  Value noise = Optional(inputs, 1);
  return {Decode(noise.defined() ? latents.Sample(noise) : latents.Mode()), latents.mean,
          latents.logvar};
}

std::map<std::string, std::string> AutoencoderKL::GetDiagnostics() const {
  auto facts = Layer::GetDiagnostics();
  facts["vae.factor"] = fmt::format("{}", config_.Factor());
  facts["vae.block_out_channels"] = fmt::format("{}", fmt::join(config_.block_out_channels, ", "));
  facts["vae.tile"] = encode_tiles_ ? fmt::format("{}", encode_tiles_->size) : "none";
  return facts;
}

std::map<std::string, Tensor> AutoencoderKL::CurrentNames(std::map<std::string, Tensor> tensors) {
  constexpr std::pair<std::string_view, std::string_view> kRenamed[] = {
      {"query", "to_q"}, {"key", "to_k"}, {"value", "to_v"}, {"proj_attn", "to_out.0"}};
  for (std::string coder : {"encoder", "decoder"}) {
    for (auto [old_name, new_name] : kRenamed) {
      for (std::string suffix : {".weight", ".bias"}) {
        auto key = [&](std::string_view name) {
          return fmt::format("{}.mid_block.attentions.0.{}{}", coder, name, suffix);
        };
        auto node = tensors.extract(key(old_name));
        if (!node) continue;
        node.key() = key(new_name);
        auto result = tensors.insert(std::move(node));
        Check(result.inserted, "{}: tensor '{}' is there twice, also under its old name '{}'",
              kOwner, result.position->first, old_name);
      }
    }
  }
  return tensors;
}

}  // namespace calotype
