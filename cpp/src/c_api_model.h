// A model of the C interface, as its other handles hold it.
#pragma once

#include <memory>

#include "c_api_call.h"
#include "ssmcore/language_model.h"

namespace ssmcore::c_api {

struct HeldModel {
  std::shared_ptr<HeldContext> context;
  LanguageModel model;
};

}  // namespace ssmcore::c_api

struct ssmcore_model {
  std::shared_ptr<ssmcore::c_api::HeldModel> held;
};
