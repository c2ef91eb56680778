# SSMCORE_WITH_CUDA: whether the CUDA backend is built. CUDA's compiler is the toolkit's, or that of
# NVIDIA's Python wheels.

set(SSMCORE_WITH_CUDA OFF)
if(NOT SSMCORE_CUDA STREQUAL "OFF")
  # The wheels keep their libraries in lib, where their compiler does not look for them.
  set(nvcc "$ENV{CUDACXX}")
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(NOT nvcc)
    find_program(SSMCORE_NVCC nvcc)
    set(nvcc "${SSMCORE_NVCC}")
  endif()
  get_filename_component(toolkit "${nvcc}" REALPATH)
  get_filename_component(toolkit "${toolkit}/../.." ABSOLUTE)
  if(EXISTS "${toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${toolkit}/lib64")
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${toolkit}/lib")
    link_directories("${toolkit}/lib")
  endif()

  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(SSMCORE_WITH_CUDA ON)
  elseif(SSMCORE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SSMCORE_CUDA=ON, but there is no CUDA compiler: put nvcc on the PATH, or "
                        "name it in CUDACXX or CMAKE_CUDA_COMPILER")
  endif()
endif()

if(SSMCORE_WITH_CUDA)
  # The GPU of this machine; without one, what is released: code for every architecture since
  # Ampere, and PTX for what comes.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    execute_process(COMMAND nvidia-smi -L RESULT_VARIABLE no_gpu OUTPUT_QUIET ERROR_QUIET)
    if(no_gpu)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120)
    else()
      set(CMAKE_CUDA_ARCHITECTURES native)
    endif()
  endif()
  enable_language(CUDA)
  # Not FindCUDAToolkit, which wants a shared library that the wheels do not have.
  find_library(SSMCORE_CUDART_STATIC cudart_static REQUIRED
               HINTS "${toolkit}/lib64" "${toolkit}/lib" ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES})
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
endif()
