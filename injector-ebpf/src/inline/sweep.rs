//! `sweep`: takes out of `FLOWS` what has ended long enough ago. It is on no device: the daemon has it run (`BPF_PROG_TEST_RUN`)
//! on a packet of its own, which lists them. One call for all of them, where looking up and deleting takes two for each.

use aya_ebpf::{macros::classifier, programs::TcContext};
use injector_common::inline::ClosedFlow;

use super::maps;

/// How many there were.
#[classifier]
fn sweep(skb: TcContext) -> i32 {
    let mut swept = 0;
    for index in 0..ClosedFlow::MOST {
        let Ok(ended) = skb.load::<ClosedFlow>(ClosedFlow::AT + index * size_of::<ClosedFlow>()) else {
            break;
        };
        swept += i32::from(maps::forget(&ended));
    }
    swept
}
