#pragma once

namespace ssmcore::bench {

// Bytes a second, read and written, that the device copies 1 GiB of random numbers at: the median
// of 20 copies. Measured at the first call for a device.
double copy_rate(int device);

}  // namespace ssmcore::bench
