# Runs an example as `PROGRAM MODEL prompt`: its output must be the file EXPECTED to the byte, and a
# model that is not there must end in status 2 and a message.
file(READ ${EXPECTED} expected)
execute_process(
  COMMAND ${PROGRAM} ${MODEL}
          "It is a truth universally acknowledged, that a single man in possession of"
  OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
if(NOT output STREQUAL expected)
  message(FATAL_ERROR "expected: ${expected}\ngot: ${output}")
endif()

execute_process(
  COMMAND ${PROGRAM} /no/such/folder prompt
  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE error)
if(NOT status EQUAL 2 OR NOT output STREQUAL "" OR NOT error MATCHES "/no/such/folder")
  message(FATAL_ERROR "status ${status}, output '${output}', error '${error}'")
endif()
