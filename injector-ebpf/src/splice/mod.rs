//! The splice engine: `inject` puts the PROXY header in front of the first payload, `verdict` carries the rest.

mod inject;
mod maps;
mod verdict;
