// LoRA files and their effect: golden files of diffusers and PEFT (tests/lora), all spellings,
// merge and unmerge, terms beside the layers, and files that do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "graph/functions.h"
#include "io/file.h"
#include "layers/attention_modules.h"
#include "pipelines/diffusion_model.h"
#include "pipelines/graph_runner.h"
#include "pipelines/lora_names.h"
#include "pipelines/lora_tags.h"
#include "tests/expect_error.h"
#include "tests/lora_models.h"
#include "tests/run_program.h"
#include "tests/temp_folder.h"

namespace calotype {
namespace {

using namespace test;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

// ---------------------------------------------------------------- golden files

TEST(LoraTest, FourSpellingsGiveTheGoldenResultsAndTheSameBits) {
  std::vector<Tensor> first;
  for (const char* dialect : {"peft", "diffusers", "kohya", "processor"}) {
    Models m;
    m.ExpectGolden("base");
    WeightedLora lora = Golden(fmt::format("attention-{}", dialect));
    EXPECT_EQ(NameOf(lora.file.dialect), dialect);
    EXPECT_EQ(lora.file.modules.size(), 40u);  // 4 attention blocks of 8 in the U-Net, 2 of 4
    MergedLora merged = MergeLora(m.model(), {&lora, 1});
    EXPECT_EQ(merged.weights(), 40u);
    m.ExpectGolden("attention");
    if (first.empty()) first = m.Weights();
    ExpectSameWeights(m.Weights(), first);
  }
}

TEST(LoraTest, ConvolutionsRanksAndAlphas) {
  std::vector<Tensor> first;
  for (const char* dialect : {"peft", "diffusers", "kohya"}) {
    Models m;
    WeightedLora lora = Golden(fmt::format("full-{}", dialect));
    MergeLora(m.model(), {&lora, 1});
    m.ExpectGolden("full");
    if (first.empty()) first = m.Weights();
    ExpectSameWeights(m.Weights(), first);
  }
  // Ranks and alphas differ.
  LoraFile file = Golden("full-peft").file;
  auto module = [&](const std::string& end) -> const LoraModule& {
    for (const auto& [name, m] : file.modules) {
      if (name.ends_with(end)) return m;
    }
    throw std::out_of_range(end);
  };
  EXPECT_EQ(module("attn1.to_q").rank(), 2);
  EXPECT_EQ(module("attn1.to_q").alpha, 5);
  EXPECT_EQ(module("attn1.to_k").alpha, 1.5);
  EXPECT_EQ(module("resnets.0.conv1").rank(), 4);
  EXPECT_EQ(module("resnets.0.conv1").down.shape().rank(), 4u);
  EXPECT_EQ(module("resnets.0.conv2").scale(), 8.0 / 3);
  EXPECT_EQ(module("mlp.fc1").alpha, 3);
}

TEST(LoraTest, TermsBesideTheLayersGiveTheSame) {
  for (const char* name : {"attention-kohya", "full-peft"}) {
    Models m;
    std::vector<Tensor> before = m.Weights();
    LoraReport report = AttachLora(m.model(), Golden(name));
    EXPECT_TRUE(report.complete());
    m.ExpectGolden(std::string(name).substr(0, std::string(name).find('-')));
    SetLoraWeight(m.model(), 0);
    m.ExpectGolden("base");
    EXPECT_EQ(DetachLora(m.model()), report.matched);
    ExpectSameWeights(m.Weights(), before);
    m.ExpectGolden("base");
    EXPECT_THAT(MessageOf<ValueError>([&] { SetLoraWeight(m.model(), 1); }), HasSubstr("no terms"));
  }
}

// ---------------------------------------------------------------- merging

TEST(LoraTest, UnmergeIsExactAndSeveralAddUp) {
  Models m;
  std::vector<Tensor> before = m.Weights();
  std::vector<WeightedLora> both = {Golden("attention-kohya", 0.5), Golden("full-peft", -0.3)};
  MergedLora merged = MergeLora(m.model(), both);
  EXPECT_EQ(merged.reports().size(), 2u);
  Tensor together = m.Run().out;
  merged.Unmerge();
  ExpectSameWeights(m.Weights(), before);
  merged.Unmerge();  // nothing more to do
  m.ExpectGolden("base");

  // One after the other, and as two terms beside the layers.
  MergedLora one = MergeLora(m.model(), {&both[0], 1}), two = MergeLora(m.model(), {&both[1], 1});
  EXPECT_LT(RelativeError(m.Run().out, together), 2e-6);
  // The first can go only after the second.
  EXPECT_THAT(MessageOf<ValueError>([&] { one.Unmerge(); }), HasSubstr("changed since"));
  two.Unmerge();
  one.Unmerge();
  ExpectSameWeights(m.Weights(), before);
  AttachLora(m.model(), both[0], "a");
  AttachLora(m.model(), both[1], "b");
  EXPECT_LT(RelativeError(m.Run().out, together), 5e-6);
}

TEST(LoraTest, MergeIsTheFormula) {
  Models m;
  LoraFile file = Golden("full-kohya").file;
  for (const char* path : {"down_blocks.1.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in",
                           "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"}) {
    ParameterPtr weight = m.unet->FindParameter(std::string(path) + ".weight");
    Tensor before = weight->value().Clone();
    WeightedLora lora{file, 0.37};
    MergedLora merged = MergeLora(m.model(), {&lora, 1});
    const LoraModule& t = file.modules.at(KohyaName(std::string("unet.") + path));
    int64_t rank = t.rank(), out = before.shape()[0], in = before.elements() / out;
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r)
          sum += double{t.up.data()[o * rank + r]} * t.down.data()[r * in + i];
        double expected = before.data()[o * in + i] + 0.37 * *t.alpha / double(rank) * sum;
        EXPECT_NEAR(weight->value().data()[o * in + i], expected, 1e-7 * std::abs(expected) + 1e-9);
      }
    }
    merged.Unmerge();
  }
}

TEST(LoraTest, CompiledCodeSeesWeightAndTrainedTerms) {
  Models m;
  AttachLora(m.model(), Golden("full-peft"));
  std::vector<Tensor> inputs = {m.golden.at("sample"), m.golden.at("timestep"),
                                m.golden.at("full.context")};
  ComputationGraph graph = m.unet->Export({{"sample", inputs[0].type()},
                                           {"timestep", inputs[1].type()},
                                           {"encoder_hidden_states", inputs[2].type()}});
  GraphRunner compiled(std::move(graph), Backend::kJit);
  auto expect = [&](const Tensor& expected) {
    EXPECT_LT(RelativeError(compiled.Run(inputs)[0], expected), 5e-6);
  };
  expect(m.golden.at("full.out"));
  SetLoraWeight(m.model(), 0.2);
  Tensor weaker = m.unet->Forward(inputs)[0];
  EXPECT_GT(RelativeError(weaker, m.golden.at("full.out")), 0.05);
  expect(weaker);

  // A training step of the terms alone: the base keeps its bits, compiled code sees the new terms.
  std::vector<ParameterPtr> terms = LoraParameters(m.model());
  for (const ParameterPtr& p : m.unet->NamedParameters()) p->set_trainable(false);
  for (const ParameterPtr& p : terms) p->set_trainable(true);
  DetachLora({nullptr, m.text.get()});
  m.unet->SetTrainingMode(true);
  Tensor base = m.unet->FindParameter("conv_in.weight")->value().Clone();
  Tensor y = m.unet->Forward(inputs)[0];
  m.unet->Backward(y);
  m.unet->UpdateParameters(0.01f);
  Tensor trained = m.unet->Forward(inputs)[0];
  EXPECT_GT(RelativeError(trained, weaker), 1e-3);
  expect(trained);
  EXPECT_TRUE(SameBits(base, m.unet->FindParameter("conv_in.weight")->value()));
}

// ---------------------------------------------------------------- names

uint64_t Hash(std::vector<std::string> names) {
  std::ranges::sort(names);
  uint64_t hash = 1469598103934665603u;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) hash = (hash ^ '\n') * 1099511628211u;
    for (unsigned char c : names[i]) hash = (hash ^ c) * 1099511628211u;
  }
  return hash;
}

// The names that kohya's rule gives for diffusers' and transformers' own modules of Stable
// Diffusion 1.5: every Linear and 1x1 convolution in a Transformer2DModel, every Linear and
// convolution in resnets and samplers, every Linear in CLIPAttention and CLIPMLP. The hashes are
// FNV-1a of the sorted names, one a line; tests/lora/README.md has the program.
TEST(LoraTest, KohyaNamesOfStableDiffusion) {
  UNet2DConditionConfig config;
  config.cross_attention_dim = {768};
  UNet2DConditionModel unet(config);
  CLIPTextModel text({.hidden_size = 768, .intermediate_size = 3072, .num_attention_heads = 12});
  std::vector<std::string> transformers, resnets, clip;
  for (const LoraTarget& t : LoraTargets({&unet, &text})) {
    std::string name = KohyaName(t.path);
    if (t.path.starts_with("text_encoder.")) {
      clip.push_back(name);
    } else if (name.find("_attentions_") != std::string::npos) {
      transformers.push_back(name);
    } else if (name.find("_resnets_") != std::string::npos ||
               name.find("samplers_") != std::string::npos) {
      resnets.push_back(name);
    }
  }
  EXPECT_EQ(transformers.size(), 192u);
  EXPECT_EQ(clip.size(), 72u);
  EXPECT_EQ(resnets.size(), 86u);
  EXPECT_EQ(Hash(transformers), 6861326493396246077u);
  EXPECT_EQ(Hash(clip), 5728306948355950681u);
  EXPECT_EQ(Hash(resnets), 8560620108193944093u);
}

TEST(LoraTest, NamesOfStabilitysBlocks) {
  auto name = [](const char* path) { return SgmName(std::string("unet.") + path, 2).value(); };
  EXPECT_EQ(name("down_blocks.0.resnets.0.conv1"), "lora_unet_input_blocks_1_0_in_layers_2");
  EXPECT_EQ(name("down_blocks.0.downsamplers.0.conv"), "lora_unet_input_blocks_3_0_op");
  EXPECT_EQ(name("down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"),
            "lora_unet_input_blocks_5_1_transformer_blocks_0_attn1_to_q");
  EXPECT_EQ(name("down_blocks.1.resnets.0.conv_shortcut"),
            "lora_unet_input_blocks_4_0_skip_connection");
  EXPECT_EQ(name("mid_block.resnets.1.time_emb_proj"), "lora_unet_middle_block_2_emb_layers_1");
  EXPECT_EQ(name("mid_block.attentions.0.proj_in"), "lora_unet_middle_block_1_proj_in");
  EXPECT_EQ(name("up_blocks.1.attentions.2.proj_out"), "lora_unet_output_blocks_5_1_proj_out");
  EXPECT_EQ(name("up_blocks.3.resnets.2.conv2"), "lora_unet_output_blocks_11_0_out_layers_3");
  EXPECT_EQ(name("up_blocks.1.upsamplers.0.conv"), "lora_unet_output_blocks_5_2_conv");

  // A file with these names gives the bits of the one with diffusers' names.
  TensorFile sgm;
  Models paths;
  const std::vector<LoraTarget> targets = LoraTargets(paths.model());
  for (const auto& [key, tensor] : Tensors("full-kohya").tensors) {
    size_t dot = key.find('.');
    std::string flat = key.substr(0, dot);
    for (const LoraTarget& t : targets) {
      if (KohyaName(t.path) == flat) flat = SgmName(t.path, 1).value_or(flat);
    }
    sgm.tensors[flat + key.substr(dot)] = tensor;
  }
  int64_t renamed = std::ranges::count_if(
      sgm.tensors, [](const auto& t) { return t.first.find("put_blocks_") != std::string::npos; });
  EXPECT_GT(renamed, 30);
  Models m, expected;
  WeightedLora lora{ParseLora(FormatSafetensors(sgm), "sgm"), kWeight},
      original = Golden("full-kohya");
  MergeLora(m.model(), {&lora, 1});
  MergeLora(expected.model(), {&original, 1});
  ExpectSameWeights(m.Weights(), expected.Weights());
}

// ---------------------------------------------------------------- writing

TEST(LoraTest, WrittenFilesComeBackTheSame) {
  test::TempFolder folder;
  Models m;
  for (const char* name : {"attention-processor", "full-kohya", "full-diffusers"}) {
    LoraFile lora = ResolveLora(m.model(), Golden(name).file);
    for (LoraDialect dialect : {LoraDialect::kKohya, LoraDialect::kPeft, LoraDialect::kDiffusers}) {
      std::filesystem::path path = folder / fmt::format("{}-{}.safetensors", name, NameOf(dialect));
      SaveLora(path, lora, dialect);
      LoraFile read = LoadLora(path);
      EXPECT_EQ(read.dialect, dialect);
      EXPECT_TRUE(read.unknown.empty());
      read = ResolveLora(m.model(), read);
      ASSERT_EQ(read.modules.size(), lora.modules.size());
      for (const auto& [module, expected] : lora.modules) {
        const LoraModule& actual = read.modules.at(module);
        EXPECT_TRUE(SameBits(actual.down, expected.down)) << module;
        EXPECT_TRUE(SameBits(actual.up, expected.up)) << module;
        EXPECT_EQ(actual.scale(), expected.scale()) << module << " " << path;
      }
    }
    EXPECT_THAT(MessageOf<ValueError>(
                    [&] { SaveLora(folder / "x.safetensors", lora, LoraDialect::kProcessor); }),
                HasSubstr("read only"));
  }
  // Terms that were attached are what is written.
  AttachLora(m.model(), Golden("full-peft"));
  SaveLora(folder / "a.safetensors", CollectLora(m.model()), LoraDialect::kKohya);
  DetachLora(m.model());
  WeightedLora again{LoadLora(folder / "a.safetensors"), kWeight};
  MergeLora(m.model(), {&again, 1});
  m.ExpectGolden("full");
  // Without a model, kohya's names are those of Stable Diffusion.
  TensorFile one;
  one.tensors["lora_unet_up_blocks_3_attentions_2_proj_in.lora_down.weight"] =
      Tensor::Full({2, 320, 1, 1}, 1);
  one.tensors["lora_unet_up_blocks_3_attentions_2_proj_in.lora_up.weight"] =
      Tensor::Full({320, 2, 1, 1}, 1);
  LoraFile resolved = ResolveLora(ParseLora(FormatSafetensors(one), "one"));
  EXPECT_EQ(resolved.modules.begin()->first, "unet.up_blocks.3.attentions.2.proj_in");
}

// ---------------------------------------------------------------- what does not fit

TEST(LoraTest, ALoraForAnotherModelChangesNothing) {
  Models m;
  std::vector<Tensor> before = m.Weights();
  WeightedLora good = Golden("full-peft");
  // Wider layers than the model has.
  WeightedLora wide = good;
  wide.file.source = "wide.safetensors";
  for (auto& [name, module] : wide.file.modules) {
    Shape shape = module.down.shape();
    module.down = Tensor::Full(shape.With(1, shape[1] * 2), 1);
  }
  std::vector<WeightedLora> loras = {good, wide};
  for (bool allow : {false, true}) {
    std::string text =
        MessageOf<FileError>([&] { MergeLora(m.model(), loras, {.allow_unmatched = allow}); });
    EXPECT_THAT(text, HasSubstr("wide.safetensors: the LoRA does not fit the model: 0 of "));
    EXPECT_THAT(text, HasSubstr("wrong shape"));
    EXPECT_THAT(text,
                HasSubstr("2 times text_encoder.text_model.encoder.layers.*.mlp.fc1, the first: "
                          "text_encoder.text_model.encoder.layers.0.mlp.fc1: down [2, 32]"));
    EXPECT_THAT(text, HasSubstr("more kinds of layers"));
    EXPECT_LT(std::ranges::count(text, '\n'), 20);
    ExpectSameWeights(m.Weights(), before);
    EXPECT_THROW(AttachLora(m.model(), wide, "lora", {.allow_unmatched = allow}), FileError);
    ExpectSameWeights(m.Weights(), before);
  }
  // Layers that the model does not have: an error, unless they may be left out.
  LoraModel unet_only{m.unet.get(), nullptr};
  std::string text = MessageOf<FileError>([&] { MergeLora(unet_only, {&good, 1}); });
  EXPECT_THAT(text, HasSubstr("no such layer (8):"));
  EXPECT_THAT(text, HasSubstr("2 times text_encoder.text_model.encoder.layers.*.self_attn.q_proj"));
  EXPECT_THAT(text, HasSubstr("--allow-unmatched"));
  ExpectSameWeights(m.Weights(), before);
  MergedLora merged = MergeLora(unet_only, {&good, 1}, {.allow_unmatched = true});
  EXPECT_EQ(merged.reports()[0].unmatched.size(), 8u);
  merged.Unmerge();
  // If nothing fits, allow_unmatched does not help.
  LoraModel text_only{nullptr, m.text.get()};
  WeightedLora unet_terms = good;
  std::erase_if(unet_terms.file.modules, [](const auto& x) { return x.first.starts_with("text"); });
  EXPECT_THAT(MessageOf<FileError>([&] {
                MergeLora(text_only, {&unet_terms, 1}, {.allow_unmatched = true});
              }),
              HasSubstr("0 of "));
  // One layer twice, by two spellings.
  WeightedLora twice = good;
  twice.file.modules["lora_unet_conv_in"] = twice.file.modules.at("unet.conv_in");
  EXPECT_THAT(MessageOf<FileError>([&] {
                MergeLora(m.model(), {&twice, 1});
              }),
              HasSubstr("twice (1):"));
  ExpectSameWeights(m.Weights(), before);
}

TEST(LoraTest, FusedProjectionsAreRefused) {
  Models m;
  auto before = nn::FuseQkvProjections(*m.unet);
  WeightedLora lora = Golden("attention-peft");
  EXPECT_THAT(MessageOf<ValueError>([&] {
                MergeLora(m.model(), {&lora, 1});
              }),
              HasSubstr("attn1.to_qkv are fused projections"));
  nn::UnfuseQkvProjections(*m.unet, before);
  AttachLora(m.model(), lora);
  m.ExpectGolden("attention");
  // The other way round, when the graph is built.
  nn::FuseQkvProjections(*m.unet);
  EXPECT_THAT(MessageOf<ValueError>([&] { m.Run(); }), HasSubstr("would be ignored"));
}

TEST(LoraTest, DamagedAndForeignFiles) {
  auto parse = [](const TensorFile& file) { return ParseLora(FormatSafetensors(file), "f"); };
  TensorFile good = Tensors("full-kohya");
  const std::string name = "lora_unet_mid_block_attentions_0_proj_in";
  auto without = [&](const std::string& key) {
    TensorFile file = good;
    EXPECT_EQ(file.tensors.erase(name + key), 1u);
    return file;
  };
  auto with = [&](const std::string& key, const Tensor& tensor) {
    TensorFile file = good;
    file.tensors[key] = tensor;
    return file;
  };
  auto damaged = [&](const TensorFile& file) { return MessageOf<FileError>([&] { parse(file); }); };
  auto foreign = [&](const std::string& key) {
    return MessageOf<UnsupportedFileError>([&] { parse(with(key, Tensor::Full({2, 2}, 1))); });
  };
  for (const char* pickle : {"a.ckpt", "a.pt", "a.pth", "a.bin"}) {
    EXPECT_THAT(MessageOf<UnsupportedFileError>([&] { LoadLora(pickle); }),
                HasSubstr(std::string(pickle) + ": a pickle"));
  }
  EXPECT_THAT(damaged(without(".lora_up.weight")), HasSubstr(name + " has only its down (A) half"));
  EXPECT_THAT(damaged(without(".lora_down.weight")), HasSubstr(name + " has only its up (B) half"));
  EXPECT_THAT(damaged(with(name + ".lora_up.weight", Tensor::Full({8, 7, 1, 1}, 1))),
              HasSubstr("do not fit"));
  EXPECT_THAT(damaged(with(name + ".lora_down.weight", Tensor::Full({8}, 1))),
              HasSubstr("do not fit"));
  EXPECT_THAT(damaged(with(name + ".alpha", Tensor::Full({2}, 1))), HasSubstr("one number"));
  EXPECT_THAT(damaged(with(name + ".alpha", Tensor::Scalar(NAN))), HasSubstr("not finite"));
  EXPECT_THAT(damaged(with(name + ".lora_up.weight", Tensor::Full({8, 3, 1, 1}, INFINITY))),
              HasSubstr("not finite"));
  TensorFile two = Tensors("full-peft");
  two.tensors["unet.conv_in.lora.down.weight"] = two.tensors.at("unet.conv_in.lora_A.weight");
  EXPECT_THAT(damaged(two), HasSubstr("module unet.conv_in has two down (A) tensors"));
  EXPECT_THAT(foreign(name + ".hada_w1_a"), HasSubstr("1 of "));
  EXPECT_THAT(foreign(name + ".hada_w1_a"), HasSubstr("LoHa"));
  EXPECT_THAT(foreign(name + ".lokr_w1"), HasSubstr("LoKr"));
  EXPECT_THAT(foreign(name + ".dora_scale"), HasSubstr("DoRA"));
  EXPECT_THAT(foreign(name + ".lora_mid.weight"), HasSubstr("CP"));
  EXPECT_THAT(foreign("unet.conv_in.lora_B.bias"), HasSubstr("bias"));
  EXPECT_THAT(MessageOf<FileError>([] { LoadLora(kFolder / "golden.safetensors"); }),
              HasSubstr("no LoRA"));
  EXPECT_THROW(LoadLora(kFolder / "missing.safetensors"), FileError);
  // Names from a file are shown without their control characters.
  EXPECT_THAT(damaged(with("unet.a\x1b[2J.lora_A.weight", Tensor::Full({2, 2}, 1))),
              AllOf(HasSubstr("'unet.a\\x1b[2J' has only"), Not(HasSubstr("\x1b"))));
  // A tensor of another kind is one that does not match.
  LoraFile bundle = parse(with("bundle_emb.x.string_to_param", Tensor::Full({2, 2}, 1)));
  EXPECT_EQ(bundle.unknown, std::vector<std::string>{"bundle_emb.x.string_to_param"});
  Models m;
  EXPECT_THAT(CheckLora(m.model(), bundle).ToString(),
              HasSubstr("no such layer (1):\n  bundle_emb"));
  // Metadata that is no configuration.
  TensorFile peft = Tensors("full-peft");
  peft.metadata["lora_adapter_metadata"] = "[1]";
  EXPECT_THAT(damaged(peft), HasSubstr("not a JSON object"));
  peft.metadata["lora_adapter_metadata"] = R"({"unet.lora_alpha": "x"})";
  EXPECT_THAT(damaged(peft), HasSubstr("not a PEFT configuration"));
  peft.metadata["lora_adapter_metadata"] =
      R"({"unet.lora_alpha": 1, "unet.alpha_pattern": {"a|b": 2}})";
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { parse(peft); }), HasSubstr("a|b"));
  peft.metadata["lora_adapter_metadata"] = R"({"unet.lora_alpha": 1, "unet.use_dora": true})";
  EXPECT_THAT(MessageOf<UnsupportedError>([&] { parse(peft); }), HasSubstr("DoRA"));
}

TEST(LoraTest, TagsInPrompts) {
  std::string prompt = "a <lora:style:0.8>boat<lora:face:-1>, <lora:style:2> red<lora:b_c>";
  EXPECT_THAT(TakeLoraTags(prompt),
              ElementsAre(LoraTag{"style", 0.8}, LoraTag{"face", -1}, LoraTag{"b_c", 1}));
  EXPECT_EQ(prompt, "a boat,  red");
  EXPECT_THAT(TakeLoraTags(prompt), ElementsAre());
  for (std::string wrong : {"x <lora:a", "<lora:>", "<lora::1>", "<lora:a:>", "<lora:a:x>",
                            "<lora:a:1x>", "<lora:a:nan>", "<lora:a:inf>", "<lora:a:1:2>"}) {
    EXPECT_THROW(TakeLoraTags(wrong), ValueError) << wrong;
  }
  EXPECT_EQ(LoraTagFile(kFolder, "attention-peft"), kFolder / "attention-peft.safetensors");
  EXPECT_THAT(MessageOf<FileError>([] { LoraTagFile(kFolder, "none"); }),
              HasSubstr((kFolder / "none.safetensors").string()));
  for (const char* name : {"", "..", "../a", "/etc/a", "a/b"})
    EXPECT_THROW(LoraTagFile(kFolder, name), ValueError) << name;
}

TEST(LoraTest, MergesIntoOnePart) {
  Models m;
  auto versions = [&] {
    std::vector<uint64_t> result;
    for (const ParameterPtr& p : m.unet->NamedParameters()) result.push_back(p->version());
    return result;
  };
  const std::vector<uint64_t> before = versions();
  WeightedLora lora = Golden("full-kohya");
  MergedLora merged =
      MergeLora(m.model(), {&lora, 1}, {.only = m.text.get(), .keep_originals = false});
  EXPECT_THAT(MessageOf<ValueError>([&] { merged.Unmerge(); }), HasSubstr("not kept"));
  EXPECT_EQ(versions(), before);
  EXPECT_GT(merged.weights(), 0u);
  MergeLora(m.model(), {&lora, 1}, {.only = m.unet.get(), .keep_originals = false});
  m.ExpectGolden("full");
}

TEST(LoraTest, FileAndWeight) {
  std::string path = (kFolder / "attention-peft.safetensors").string();
  EXPECT_EQ(LoadWeightedLora(path).weight, 1);
  EXPECT_EQ(LoadWeightedLora(path + ":0.25").weight, 0.25);
  EXPECT_EQ(LoadWeightedLora(path + ":-2").weight, -2);
  for (const char* weight : {":x", ":", ":1e999", ":nan", ":1 "}) {
    EXPECT_THAT(MessageOf<ValueError>([&] { LoadWeightedLora(path + weight); }),
                HasSubstr("is no number"))
        << weight;
  }
}

TEST(LoraTest, FreshTerms) {
  Models m;
  LoraConfig config{.rank = 2, .alpha = 6, .text_encoder_targets = {"q_proj", "fc1"}, .seed = 5};
  EXPECT_EQ(AddLora(m.model(), config), 36);
  EXPECT_EQ(LoraParameters(m.model()).size(), 72u);
  m.ExpectGolden("base");  // up is 0
  LoraFile file = CollectLora(m.model());
  const LoraModule& q =
      file.modules.at("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q");
  EXPECT_EQ(q.down.shape(), (Shape{2, 8}));
  EXPECT_EQ(q.alpha, 6);
  EXPECT_THAT(MessageOf<ValueError>([&] { AddLora(m.model(), config); }), HasSubstr("already"));
  DetachLora(m.model());
  config.targets.push_back("to_x");
  EXPECT_THAT(MessageOf<ValueError>([&] { AddLora(m.model(), config); }), HasSubstr("'to_x'"));
  EXPECT_TRUE(LoraParameters(m.model()).empty());
}

// ---------------------------------------------------------------- the program

TEST(LoraTest, ProgramSaysWhatItLeavesOut) {
  TempFolder folder;
  const std::string model =
      (std::filesystem::path(CALOTYPE_TEST_DATA) / "fixtures/stable_diffusion/model").string();
  const std::string file = folder / "more.safetensors", out = folder / "x.png";
  auto loaded = DiffusionModel::Load(model);
  const int64_t layers = AddLora(LoraModelOf(*loaded), {.rank = 2});
  SaveLora(file, CollectLora(LoraModelOf(*loaded)), LoraDialect::kPeft);
  // Names and metadata do not reach the terminal as they are.
  TensorFile more = ReadSafetensors(file);
  more.tensors["unet.none\xc3\xa9.lora_A.weight"] = Tensor::Full({2, 8}, 1);
  more.tensors["unet.none\xc3\xa9.lora_B.weight"] = Tensor::Full({8, 2}, 1);
  more.metadata["note"] = std::string(119, 'n') + "\xc3\xa9 more";
  WriteSafetensors(file, more);

  auto run = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {CALOTYPE_BIN_DIR "/calotype", "--threads", "1"});
    return RunProgram(arguments);
  };
  ProgramResult info = run({"lora", "info", file, "--model", model, "--allow-unmatched"});
  EXPECT_EQ(info.code, 0) << info.err;
  EXPECT_THAT(info.err, HasSubstr("warning: "));  // about the model
  EXPECT_THAT(info.out, AllOf(HasSubstr("    1 'unet.none\\xc3\\xa9'\n"),
                              HasSubstr("nnn\\xc3...' (126 bytes)\n"),
                              HasSubstr("no such layer (1):\n  'unet.none\\xc3\\xa9'\n")));
  std::vector<std::string> sample{
      "sample", "-m",        model,   "-p",     "the cat", "--steps", "1", "--guidance-scale",
      "1",      "--backend", "eager", "--lora", file,      "--out",   out};
  ProgramResult strict = run(sample);
  EXPECT_EQ(strict.code, 3);
  sample.push_back("--allow-unmatched");
  ProgramResult drawn = run(sample);
  EXPECT_EQ(drawn.code, 0) << drawn.err;
  EXPECT_THAT(drawn.err,
              AllOf(HasSubstr(fmt::format("warning: {}: {} of {} modules match\nno such layer (1):",
                                          file, layers, layers + 1)),
                    HasSubstr("'unet.none\\xc3\\xa9'")));

  auto fails = [&](int code, const std::string& text, const std::vector<std::string>& arguments) {
    ProgramResult result = run(arguments);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_THAT(result.err, HasSubstr(text));
  };
  fails(2, "--allow-unmatched requires --model", {"lora", "info", file, "--allow-unmatched"});
  for (const char* side : {"--width", "--height"})
    fails(2, "excludes --side", {"sample", "-m", model, "-p", "x", "--side", "64", side, "64"});
  // A model is not overwritten; what is wrong is said before anything is read.
  WriteText(folder / "merged/model_index.json", "{}");
  fails(3, "holds a model already",
        {"lora", "merge", "--model", model, "--lora", "none", "--out", folder / "merged"});
  EXPECT_EQ(ReadText(folder / "merged/model_index.json"), "{}");
}

}  // namespace
}  // namespace calotype
