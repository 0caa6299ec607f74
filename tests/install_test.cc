// What others get from a clone: an installed tree that find_package(calotype CONFIG) finds, and the
// include-arrow checker that guards the folders.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/run_program.h"

namespace {

namespace fs = std::filesystem;
using Folder = calotype::test::TempFolder;

const fs::path kSource = CALOTYPE_SOURCE_DIR;
const fs::path kBuild = fs::path(CALOTYPE_BIN_DIR).parent_path();

// Runs a shell command; `out` holds its errors too.
calotype::test::ProgramResult Shell(const std::string& command) {
  return calotype::test::RunProgram({"/bin/sh", "-c", command + " 2>&1"});
}

// Builds the consumer against the installed tree and returns what it prints.
std::string BuildAndRun(const fs::path& prefix, const std::string& find, const std::string& link,
                        const std::string& code) {
  Folder consumer;
  consumer.Write("CMakeLists.txt",
                 "cmake_minimum_required(VERSION 3.22)\nproject(consumer CXX)\n" + find +
                     "\nadd_executable(consumer main.cc)\ntarget_link_libraries(consumer " + link +
                     ")\n");
  consumer.Write("main.cc", code);
  std::string folder = consumer.path().string();
  auto configured =
      Shell("cmake -S " + folder + " -B " + folder + "/build -G Ninja -DCMAKE_BUILD_TYPE=Release" +
            " -DCMAKE_PREFIX_PATH=" + prefix.string());
  EXPECT_EQ(configured.code, 0) << configured.out;
  auto built = Shell("cmake --build " + folder + "/build");
  EXPECT_EQ(built.code, 0) << built.out;
  auto ran = Shell(folder + "/build/consumer");
  EXPECT_EQ(ran.code, 0) << ran.out;
  return ran.out;
}

TEST(InstallTest, ConsumersOfTheInstalledTreeBuildAndRun) {
  Folder prefix;
  auto installed =
      Shell("cmake --install " + kBuild.string() + " --prefix " + prefix.path().string());
  ASSERT_EQ(installed.code, 0) << installed.out;
  EXPECT_EQ(
      BuildAndRun(prefix.path(), "find_package(calotype CONFIG REQUIRED)", "calotype::graph", R"(
#include <cstdio>
#include "graph/functions.h"
#include "graph/interpreter.h"
int main() {
  calotype::ComputationGraph graph;
  auto x = graph.Input("x", calotype::Shape{3});
  graph.Output("y", calotype::Sum(x * x));
  std::vector<calotype::Tensor> inputs{calotype::Tensor::From<float>({3}, std::vector<float>{1, 2, 3})};
  printf("%g\n", calotype::Interpreter(graph).Run(inputs)[0].Item());
}
)"),
      "14\n");
  if (fs::exists(fs::path(CALOTYPE_BIN_DIR) / "calotype")) {
    // The component that needs LLVM, and the installed program.
    EXPECT_EQ(BuildAndRun(prefix.path(), "find_package(calotype CONFIG REQUIRED COMPONENTS jit)",
                          "calotype::pipelines", R"(
#include <cstdio>
#include "graph/functions.h"
#include "jit/compile.h"
int main() {
  calotype::ComputationGraph graph;
  auto x = graph.Input("x", calotype::Shape{3});
  graph.Output("y", calotype::Sum(x * x));
  std::vector<calotype::Tensor> inputs{calotype::Tensor::From<float>({3}, std::vector<float>{1, 2, 3})};
  printf("%g\n", calotype::jit::Compile(graph)->Run(inputs)[0].Item());
}
)"),
              "14\n");
    auto version = Shell((prefix.path() / "bin/calotype").string() + " --version");
    EXPECT_EQ(version.code, 0) << version.out;
  }
}

TEST(IncludeArrowsTest, HoldInThisTree) {
  auto result = Shell("python3 " + (kSource / "tools/check_includes.py").string());
  EXPECT_EQ(result.code, 0) << result.out;
}

TEST(IncludeArrowsTest, EachBreachIsNamed) {
  Folder tree;
  tree.Write("core/tensor.h",
             "#include <vector>\n#include <fmt/format.h>\n#include <oneapi/dnnl/dnnl.hpp>\n");
  tree.Write("core/contract.cc", "#include <oneapi/dnnl/dnnl.hpp>\n#include \"core/tensor.h\"\n");
  tree.Write("core/parallel.cc", "#include <omp.h>\n");
  tree.Write("graph/graph.h",
             "#include \"core/tensor.h\"\n#include \"jit/compile.h\"\n#include <omp.h>\n");
  tree.Write(
      "jit/compile.h",
      "#include <llvm/IR/Module.h>\n#include \"graph/graph.h\"\n#include \"layers/layer.h\"\n");
  tree.Write(
      "jit/runtime/run.h",
      "#include \"core/tensor.h\"\n#include \"graph/graph.h\"\n#include <llvm/IR/Module.h>\n");
  tree.Write("layers/layer.h", "#include \"tensor.h\"\n#include <boost/any.hpp>\n");
  tree.Write("tests/a_test.cc", "#include <llvm/IR/Module.h>\n#include \"jit/compile.h\"\n");
  auto result = Shell("python3 " + (kSource / "tools/check_includes.py").string() + " " +
                      tree.path().string());
  EXPECT_EQ(result.code, 1) << result.out;
  for (const char* breach :
       {"core/tensor.h:3:", "graph/graph.h:2:", "graph/graph.h:3:", "jit/compile.h:3:",
        "jit/runtime/run.h:2:", "jit/runtime/run.h:3:", "layers/layer.h:1:", "layers/layer.h:2:"}) {
    EXPECT_NE(result.out.find(breach), std::string::npos) << breach << "\n" << result.out;
  }
  EXPECT_NE(result.out.find("8 breaches"), std::string::npos) << result.out;
}

}  // namespace
