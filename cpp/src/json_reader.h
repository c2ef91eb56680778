// Parsing the JSON files of a model folder, which may hold anything.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace ssmcore {

// Parses `text`. Bare Infinity, -Infinity and NaN, which Python's json module writes, are read as
// the strings "Infinity", "-Infinity" and "NaN". Throws Error(invalid_checkpoint), its message
// starting with `source`, for text that is not one JSON object, repeats a key within an object,
// nests deeper than 64 levels or is longer than 16 MiB.
nlohmann::json parse_json_object(std::string_view text, const std::string& source);

// A value as it may stand in an error message: JSON in ASCII, on one line, cut when long.
std::string shown(const nlohmann::json& value);

}  // namespace ssmcore
