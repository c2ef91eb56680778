# ssmcore_json (headers) and ssmcore_openblas. Python's wheels come first, since pip builds have
# them; then what the system has.

find_package(Python3 COMPONENTS Interpreter QUIET)

# Prints `expression` of a Python module, or nothing.
function(ssmcore_ask_python module expression result)
  set(answer "")
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c "import ${module}; print(${expression})"
      OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

# nlohmann-json, a header
add_library(ssmcore_json INTERFACE)
ssmcore_ask_python(nlohmann_json "list(nlohmann_json.__path__)[0] + '/include'"
                   SSMCORE_JSON_INCLUDE_HINT)
find_path(SSMCORE_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${SSMCORE_JSON_INCLUDE_HINT} REQUIRED)
target_include_directories(ssmcore_json SYSTEM INTERFACE ${SSMCORE_JSON_INCLUDE_DIR})

# OpenBLAS: the wheel's copy has prefixed symbols, is installed beside ssmcore and is its own
ssmcore_ask_python(scipy_openblas32 "scipy_openblas32.get_lib_dir()" SSMCORE_OPENBLAS_LIB_HINT)
ssmcore_ask_python(scipy_openblas32 "scipy_openblas32.get_include_dir()"
                   SSMCORE_OPENBLAS_INCLUDE_HINT)
find_library(SSMCORE_SCIPY_OPENBLAS scipy_openblas HINTS ${SSMCORE_OPENBLAS_LIB_HINT})
add_library(ssmcore_openblas INTERFACE)
if(SSMCORE_SCIPY_OPENBLAS)
  find_path(SSMCORE_OPENBLAS_INCLUDE_DIR cblas.h HINTS ${SSMCORE_OPENBLAS_INCLUDE_HINT} REQUIRED
            NO_DEFAULT_PATH)
  target_compile_definitions(ssmcore_openblas INTERFACE SSMCORE_PREFIXED_OPENBLAS)
  set(SSMCORE_OPENBLAS_LIBRARY ${SSMCORE_SCIPY_OPENBLAS})
else()
  find_library(SSMCORE_OPENBLAS_LIBRARY openblas REQUIRED)
  find_path(SSMCORE_OPENBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas openblas-pthread REQUIRED)
endif()
target_include_directories(ssmcore_openblas SYSTEM
                           INTERFACE $<BUILD_INTERFACE:${SSMCORE_OPENBLAS_INCLUDE_DIR}>)
get_filename_component(SSMCORE_OPENBLAS_NAME ${SSMCORE_OPENBLAS_LIBRARY} NAME)
target_link_libraries(
  ssmcore_openblas
  INTERFACE $<BUILD_INTERFACE:${SSMCORE_OPENBLAS_LIBRARY}>)
