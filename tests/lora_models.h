// The golden files of tests/lora, and the tiny models that they are for.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "pipelines/lora.h"
#include "pipelines/model_folder.h"

namespace calotype::test {

inline const std::filesystem::path kFolder = std::filesystem::path(CALOTYPE_TEST_DATA) / "lora";
constexpr double kWeight = 0.7;  // of the golden results

inline double RelativeError(const Tensor& actual, const Tensor& expected) {
  EXPECT_EQ(actual.shape(), expected.shape());
  double difference = 0, largest = 0;
  for (int64_t i = 0; i < expected.elements(); ++i) {
    difference = std::max(difference, std::abs(double{actual.data()[i]} - expected.data()[i]));
    largest = std::max(largest, std::abs(double{expected.data()[i]}));
  }
  return difference / largest;
}

inline bool SameBits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() &&
         std::memcmp(a.raw(), b.raw(), static_cast<size_t>(a.bytes())) == 0;
}

// The tiny U-Net and text encoder of the golden files.
struct Models {
  std::unique_ptr<UNet2DConditionModel> unet = LoadUNet(kFolder / "unet");
  std::unique_ptr<CLIPTextModel> text = LoadCLIPTextModel(kFolder / "text_encoder");
  std::map<std::string, Tensor> golden = ReadSafetensors(kFolder / "golden.safetensors").tensors;

  Models() {
    unet->SetTrainingMode(false);
    text->SetTrainingMode(false);
  }
  LoraModel model() { return {unet.get(), text.get()}; }

  struct Result {
    Tensor context, out;
  };
  Result Run() {
    Tensor context = text->Forward(golden.at("ids"));
    return {context, unet->Forward({golden.at("sample"), golden.at("timestep"), context})};
  }
  void ExpectGolden(const std::string& kind) {
    Result result = Run();
    EXPECT_LT(RelativeError(result.context, golden.at(kind + ".context")), 5e-6) << kind;
    EXPECT_LT(RelativeError(result.out, golden.at(kind + ".out")), 5e-6) << kind;
  }
  std::vector<Tensor> Weights() {
    std::vector<Tensor> values;
    for (Layer* layer : {static_cast<Layer*>(unet.get()), static_cast<Layer*>(text.get())}) {
      for (const ParameterPtr& p : layer->NamedParameters()) values.push_back(p->value().Clone());
    }
    return values;
  }
};

inline void ExpectSameWeights(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(SameBits(a[i], b[i])) << i;
}

inline WeightedLora Golden(const std::string& name, double weight = kWeight) {
  return {LoadLora(kFolder / (name + ".safetensors")), weight};
}

inline TensorFile Tensors(const std::string& name) {
  return ReadSafetensors(kFolder / (name + ".safetensors"));
}

}  // namespace calotype::test
