# Threads::Threads and ssmcore_json (a header). Python's wheel of that comes first, since pip builds
# have it; then what the system has.

find_package(Threads REQUIRED)
find_package(Python3 COMPONENTS Interpreter QUIET)

# pip builds in an environment that is gone the next time, when a kept cache still points there.
if(IS_ABSOLUTE "${SSMCORE_JSON_INCLUDE_DIR}" AND NOT EXISTS "${SSMCORE_JSON_INCLUDE_DIR}")
  unset(SSMCORE_JSON_INCLUDE_DIR CACHE)
endif()

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
