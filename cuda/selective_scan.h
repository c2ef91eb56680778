// The kernels that selective_scan_fwd and selective_scan_bwd choose among.
#pragma once

#include "../cpp/src/selective_scan_params.h"
#include "ssmcore/context.h"

namespace ssmcore::cuda {

// One step of every row, for decoding; is_state_update() says what it takes.
bool is_state_update(const SelectiveScanFwdParams& params);
void selective_state_update_fwd(const SelectiveScanFwdParams& params, const Exec& exec);

// Real A, and B and C that vary in time; is_varying_scan() says what it takes.
bool is_varying_scan(const SelectiveScanFwdParams& params);
void selective_scan_varying_fwd(const SelectiveScanFwdParams& params, const Exec& exec);
size_t selective_scan_varying_fwd_workspace_size(const SelectiveScanFwdParams& params,
                                                 const Context& context);

// The backward of real A, and B and C that vary in time, of few states; is_varying_scan_bwd() says
// what it takes.
bool is_varying_scan_bwd(const SelectiveScanBwdParams& params, const Context& context);
void selective_scan_varying_bwd(const SelectiveScanBwdParams& params, const Exec& exec);
size_t selective_scan_varying_bwd_workspace_size(const SelectiveScanBwdParams& params,
                                                 const Context& context);

// Where everything is float64: for checking.
void selective_scan_fwd_float64(const SelectiveScanFwdParams& params, const Exec& exec);

// Everything else: any form of A, B and C, any option. Throws Error(unsupported) for dstate beyond
// 256.
void selective_scan_general_fwd(const SelectiveScanFwdParams& params, const Exec& exec);

// The backward of any form of A, B and C, with any option, in any type. Throws Error(unsupported)
// for dstate beyond 256.
void selective_scan_general_bwd(const SelectiveScanBwdParams& params, const Exec& exec);
size_t selective_scan_general_bwd_workspace_size(const SelectiveScanBwdParams& params,
                                                 const Context& context);

}  // namespace ssmcore::cuda
