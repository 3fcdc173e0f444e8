//! What never happens, whatever client, backend and network send: properties P1 to P7 of the inline engine, over arbitrary
//! sequences of segments, against a small model of a TCP receiver. The decisions are the ones that the programs carry out.

mod backend;
mod edge;
mod properties;
mod segments;
mod testbed;
