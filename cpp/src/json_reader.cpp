#include "json_reader.h"

#include <set>
#include <vector>

#include "ssmcore/error.h"

namespace ssmcore {
namespace {

using nlohmann::json;

constexpr size_t kMaxBytes = size_t{16} << 20;
constexpr int kMaxDepth = 64;
constexpr size_t kMaxShown = 100;

// Puts quotes around Infinity, -Infinity and NaN wherever they stand outside a string.
std::string quote_non_finite(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 64);
  bool in_string = false;
  for (size_t i = 0; i < text.size();) {
    size_t length = 1;
    if (in_string) {
      in_string = text[i] != '"';
      if (text[i] == '\\') length = 2;  // an escaped quote does not end the string
    } else if (text[i] == '"') {
      in_string = true;
    } else {
      for (const std::string_view word : {"-Infinity", "Infinity", "NaN"}) {
        if (text.compare(i, word.size(), word) != 0) continue;
        length = word.size();
        out += '"';
        break;
      }
    }
    out += text.substr(i, length);
    if (!in_string && length > 1) out += '"';
    i += length;
  }
  return out;
}

}  // namespace

json parse_json_object(std::string_view text, const std::string& source) {
  const auto fail = [&](const std::string& reason) {
    throw Error(ErrorCode::invalid_checkpoint, source + ": " + reason);
  };
  if (text.size() > kMaxBytes) {
    fail("expected at most " + std::to_string(kMaxBytes) + " bytes of JSON, got " +
         std::to_string(text.size()));
  }
  // The parser takes a zero byte for the end of the text.
  if (text.find('\0') != std::string_view::npos) fail("not valid JSON: it holds a zero byte");

  std::vector<std::set<std::string>> keys(kMaxDepth + 2);  // of the open object at each depth
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      if (depth >= kMaxDepth) fail("nested deeper than " + std::to_string(kMaxDepth) + " levels");
      keys[depth + 1].clear();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys[depth].insert(key).second) fail("key " + shown(parsed) + " occurs twice");
    }
    return true;
  };
  json value;
  try {
    value = json::parse(quote_non_finite(text), check);
  } catch (const json::parse_error& error) {
    fail("not valid JSON near byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    fail("not valid JSON: it holds a number out of range");
  }
  if (!value.is_object()) fail("expected a JSON object, got " + shown(value));
  return value;
}

std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace);
  if (text.size() > kMaxShown) text = text.substr(0, kMaxShown) + "...";
  return text;
}

}  // namespace ssmcore
