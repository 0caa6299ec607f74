# cmake -DSOURCE=... -DOUT=... -DVERSION=... -P CalotypeBuildId.cmake: writes a C++ file with kBuildId
# (jit/cache.h), the version and a hash of the code generator's sources: machine code that another
# state of them made is never taken from the compile cache.
file(GLOB files LIST_DIRECTORIES false ${SOURCE}/jit/*.cc ${SOURCE}/jit/*.h)
list(SORT files)
set(text "")
foreach(file ${files})
  file(SHA256 ${file} hash)
  string(APPEND text "${hash}\n")
endforeach()
string(SHA256 hash "${text}")
file(WRITE ${OUT} "namespace calotype::jit {
extern const char* const kBuildId;
const char* const kBuildId = \"${VERSION} ${hash}\";
}  // namespace calotype::jit
")
