//! Nothing to export: the crate is its programs.
#![no_std]
