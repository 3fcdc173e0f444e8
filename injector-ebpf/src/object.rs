//! Panic handler and licence, which every BPF object needs.

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the compiler removes panics that it proves unreachable, and the verifier rejects a
    // program with any other.
    loop {}
}

/// The kernel reads this to decide which helpers a program may call. The helpers used here do not need
/// a GPL-compatible licence; a few tracing helpers do.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
