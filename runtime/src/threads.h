// How many threads compute fastest.
#pragma once

namespace llava_edge {

// One a physical core (a performance core on Apple silicon) that this process may use.
int default_threads();

// More than any call may ask for: threads that the system refuses would end the process.
int max_threads();

}  // namespace llava_edge
