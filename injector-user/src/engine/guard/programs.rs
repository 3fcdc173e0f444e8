//! Loading the guard's programs.

use std::{path::Path, sync::Arc};

use aya::{
    Ebpf, EbpfLoader,
    programs::{SchedClassifier, Xdp},
};

use super::{attach::SET, maps, maps::Maps};
use crate::{
    config::Guard as Settings,
    engine::bpf::{LoadError, program},
};

/// The program for drivers.
pub(super) const XDP: &str = "guard_xdp";

/// Loads the programs with the maps that are pinned there, or makes these.
pub(super) fn load(settings: &Settings, pins: &Path) -> Result<(Ebpf, Arc<Maps>), LoadError> {
    let mut loader = EbpfLoader::new();
    maps::prepare(&mut loader, pins, settings.max_bans)
        .map_err(|error| LoadError::Pin { map: "BANNED_ADDRESSES", error })?;
    let (programs, maps) = load_with(&mut loader)?;
    maps.take_over(pins)?;
    Ok((programs, Arc::new(maps)))
}

/// Loads the programs, as the loader is prepared.
pub(super) fn load_with(loader: &mut EbpfLoader<'_>) -> Result<(Ebpf, Maps), LoadError> {
    let mut programs = loader.load(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/guard")))?;
    for name in SET.programs {
        let loaded: &mut SchedClassifier = program(&mut programs, name)?;
        loaded.load().map_err(|error| LoadError::Program { program: name, error })?;
    }
    let loaded: &mut Xdp = program(&mut programs, XDP)?;
    loaded.load().map_err(|error| LoadError::Program { program: XDP, error })?;
    let maps = Maps::take(&mut programs)?;
    Ok((programs, maps))
}
