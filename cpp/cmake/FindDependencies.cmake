# Threads::Threads, ssmcore_json (a header) and ssmcore::openblas. Python's wheels come first, since
# pip builds have them; then what the system has.

find_package(Threads REQUIRED)
find_package(Python3 COMPONENTS Interpreter QUIET)

# pip builds in an environment that is gone the next time, when a kept cache still points there.
foreach(place SSMCORE_JSON_INCLUDE_DIR SSMCORE_SCIPY_OPENBLAS SSMCORE_SCIPY_OPENBLAS_INCLUDE_DIR)
  if(IS_ABSOLUTE "${${place}}" AND NOT EXISTS "${${place}}")
    unset(${place} CACHE)
  endif()
endforeach()

# The value of a Python expression about a module, or nothing.
function(ssmcore_ask_python module expression result)
  set(answer "")
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND ${Python3_EXECUTABLE} -c "import ${module}; print(${expression})"
      OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

# nlohmann-json
ssmcore_ask_python(nlohmann_json "list(nlohmann_json.__path__)[0] + '/include'" json_include)
find_path(SSMCORE_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${json_include} REQUIRED)
add_library(ssmcore_json INTERFACE)
target_include_directories(ssmcore_json SYSTEM INTERFACE ${SSMCORE_JSON_INCLUDE_DIR})

# OpenBLAS. The wheel's copy has prefixed symbols, so that it lives beside any other OpenBLAS in the
# process, and is installed with ssmcore. SSMCORE_SCIPY_OPENBLAS=OFF insists on the system's.
ssmcore_ask_python(scipy_openblas32 "scipy_openblas32.get_lib_dir()" openblas_lib)
ssmcore_ask_python(scipy_openblas32 "scipy_openblas32.get_include_dir()" openblas_include)
find_library(SSMCORE_SCIPY_OPENBLAS scipy_openblas HINTS ${openblas_lib})
add_library(ssmcore::openblas UNKNOWN IMPORTED GLOBAL)
if(SSMCORE_SCIPY_OPENBLAS)
  find_path(SSMCORE_SCIPY_OPENBLAS_INCLUDE_DIR cblas.h HINTS ${openblas_include} REQUIRED
            NO_DEFAULT_PATH)
  set_target_properties(
    ssmcore::openblas
    PROPERTIES IMPORTED_LOCATION ${SSMCORE_SCIPY_OPENBLAS}
               INTERFACE_INCLUDE_DIRECTORIES ${SSMCORE_SCIPY_OPENBLAS_INCLUDE_DIR}
               INTERFACE_COMPILE_DEFINITIONS SSMCORE_PREFIXED_OPENBLAS)
else()
  find_library(SSMCORE_OPENBLAS_LIBRARY openblas REQUIRED)
  find_path(SSMCORE_OPENBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas openblas-pthread REQUIRED)
  set_target_properties(
    ssmcore::openblas PROPERTIES IMPORTED_LOCATION ${SSMCORE_OPENBLAS_LIBRARY}
                                 INTERFACE_INCLUDE_DIRECTORIES ${SSMCORE_OPENBLAS_INCLUDE_DIR})
endif()
