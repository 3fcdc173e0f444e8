//! The library is empty. The crate's programs are its binaries.
#![no_std]
