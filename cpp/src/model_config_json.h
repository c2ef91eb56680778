// Model configurations from parsed JSON.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "ssmcore/model_config.h"

namespace ssmcore {

// parse_model_config of an object already parsed; messages start with `source`.
ModelConfig read_model_config(const nlohmann::json& object, const std::string& source);

// The field eos_token_id of a config.json or generation_config.json: an integer, a list of them, or
// null for none. Ids outside the vocabulary, such as -1, can never be drawn and are left out.
std::vector<int64_t> read_eos_token_ids(const nlohmann::json& eos_token_id, int64_t vocab_size,
                                        const std::string& source);

}  // namespace ssmcore
