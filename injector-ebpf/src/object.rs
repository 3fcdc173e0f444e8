//! What every object of programs needs.

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that nothing gets here: an unreachable panic is compiled away or the load fails.
    loop {}
}

/// `apply_bytes` and `push_data` are ordinary helpers; the program types they belong to ask for no licence, but a
/// few tracing helpers do, and the kernel reads this to decide.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
