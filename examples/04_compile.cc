// A compiled model. The U-Net's graph becomes machine code once for these input shapes; calls give
// what eager execution gives, and see weights that change later.
#include <fmt/format.h>

#include <chrono>
#include <cmath>

#include "core/random.h"
#include "jit/compile.h"
#include "models/presets.h"
#include "models/unet_2d_condition.h"

using namespace calotype;

int main() {
  UNet2DConditionModel unet(UNetPreset("toy16"));
  unet.Initialize(/*seed=*/1);
  unet.SetTrainingMode(false);

  Random random(/*seed=*/2);
  std::vector<Tensor> inputs{random.NormalTensor({1, 3, 16, 16}),
                             Tensor::From({1}, std::vector<int64_t>{500}),
                             random.NormalTensor({1, 8, 64})};
  auto compiled = jit::Compile(unet.Export({{"sample", inputs[0].type()},
                                            {"timestep", inputs[1].type()},
                                            {"context", inputs[2].type()}}));
  jit::ExecutableStats stats = compiled->Stats();
  fmt::print("{} regions from {} kernels, {} KiB of memory, compiled in {:.0f} ms\n", stats.regions,
             stats.kernels, stats.arena_bytes / 1024, stats.lower_ms + stats.compile_ms);

  auto compare = [&](const char* when) {
    Tensor eager = unet.Forward(inputs)[0], jit = compiled->Run(inputs)[0];
    double difference = 0, largest = 0;
    for (int64_t i = 0; i < eager.elements(); ++i) {
      difference = std::max<double>(difference, std::abs(jit.data()[i] - eager.data()[i]));
      largest = std::max<double>(largest, std::abs(eager.data()[i]));
    }
    fmt::print("{}: largest difference from eager {:.1e}, relative\n", when, difference / largest);
  };
  compare("fresh weights");
  for (const ParameterPtr& p : unet.NamedParameters()) {
    for (float& w : p->Write().values()) w *= 1.01f;
  }
  compare("changed weights");

  auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 20; ++i) compiled->Run(inputs);
  fmt::print(
      "{:.2f} ms a call\n",
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count() /
          20);
  return 0;
}
