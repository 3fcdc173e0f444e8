//! BPF objects of a running daemon, and of other tools, without their help.

mod attached;
mod fdinfo;
mod map;
mod program;
mod syscall;

pub use self::attached::{ForeignProgram, detach_link, tcx_links};
pub use self::map::{DaemonMap, map_entries, map_exists, map_ids, map_memory};
pub use self::program::{Program, Ran};
