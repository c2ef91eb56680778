#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <string>

#include "../cpp/src/cuda_backend.h"
#include "cublaslt.h"
#include "ssmcore/error.h"

namespace ssmcore::cuda {
namespace {

constexpr const char* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

struct Loader {
  std::mutex mutex;
  std::string path;  // of set_cublaslt_path()
  const CublasLt* loaded = nullptr;
};

Loader& loader() {
  // Never destroyed: threads may still be using it when the program ends.
  static Loader& loader = *new Loader;
  return loader;
}

[[noreturn]] void fail(const std::string& problem) {
  throw Error(ErrorCode::unsupported, "linear: " + problem);
}

// Appends to `tried` what was not there.
void* open(const char* file, int flags, std::string& tried) {
  void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL | flags);
  if (!library && !(flags & RTLD_NOLOAD)) {
    const char* why = dlerror();
    tried += std::string("\n  ") + (why ? why : file);
  }
  return library;
}

void* open_library(const std::string& path) {
  std::string tried;
  for (const char* name : kNames)
    if (void* library = open(name, RTLD_NOLOAD, tried)) return library;
  const char* variable = std::getenv("SSMCORE_CUBLASLT");
  if (variable && *variable) {
    if (void* library = open(variable, 0, tried)) return library;
    fail("SSMCORE_CUBLASLT names a file that cannot be loaded:" + tried);
  }
  if (!path.empty())
    if (void* library = open(path.c_str(), 0, tried)) return library;
  for (const char* name : kNames)
    if (void* library = open(name, 0, tried)) return library;
  fail(
      "cuBLASLt was not found. Install it with `pip install nvidia-cublas` (it comes with "
      "ssmcore[cuda13]), or name its file in SSMCORE_CUBLASLT. Looked for:" +
      tried);
}

template <typename Function>
void find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  if (!function) fail(std::string("the cuBLASLt that was found has no ") + name);
}

CublasLt load(const std::string& path) {
  void* library = open_library(path);
  CublasLt lt;
  find(library, "cublasLtGetStatusName", lt.status_name);
  find(library, "cublasLtCreate", lt.create);
  find(library, "cublasLtDestroy", lt.destroy);
  find(library, "cublasLtMatmulDescCreate", lt.operation_create);
  find(library, "cublasLtMatmulDescDestroy", lt.operation_destroy);
  find(library, "cublasLtMatmulDescSetAttribute", lt.operation_set);
  find(library, "cublasLtMatrixLayoutCreate", lt.layout_create);
  find(library, "cublasLtMatrixLayoutDestroy", lt.layout_destroy);
  find(library, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  find(library, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  find(library, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  find(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  find(library, "cublasLtMatmulAlgoCheck", lt.check);
  find(library, "cublasLtMatmul", lt.matmul);
  return lt;
}

}  // namespace

void set_cublaslt_path(const char* path) {
  const std::lock_guard<std::mutex> lock(loader().mutex);
  loader().path = path;
}

const CublasLt& cublaslt() {
  const std::lock_guard<std::mutex> lock(loader().mutex);
  if (!loader().loaded) loader().loaded = new CublasLt(load(loader().path));
  return *loader().loaded;
}

}  // namespace ssmcore::cuda
