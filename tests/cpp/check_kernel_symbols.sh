#!/bin/sh
# check_kernel_symbols.sh NM ISA OBJECT...
#
# Kernels are compiled once per instruction set. Of an inline function that two of them share the
# linker keeps any one copy, which may be one the machine cannot run; so all that an object
# defines for others must be in its instruction set's own namespace.
set -eu
nm=$1
isa=$2
shift 2

own=$("$nm" -C --defined-only --extern-only "$@" | grep -c "ssmcore::cpu::$isa::" || true)
foreign=$("$nm" -C --defined-only --extern-only "$@" |
  grep -E '^[0-9a-f]+ ' | grep -v "ssmcore::cpu::$isa::" || true)
if [ "$own" -eq 0 ]; then
  echo "no symbol of ssmcore::cpu::$isa in $*"
  exit 1
fi
if [ -n "$foreign" ]; then
  echo "defined outside ssmcore::cpu::$isa:"
  echo "$foreign"
  exit 1
fi
