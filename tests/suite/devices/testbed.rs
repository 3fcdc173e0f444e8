//! Client, edge and mail hosts.

use std::future::Future;

use injector_testbed::netns::Topology;

/// The three namespaces.
pub(crate) struct Testbed {
    pub(crate) topology: Topology,
}

impl Testbed {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { topology: Topology::new()? })
    }

    /// Runs a future on its own runtime inside the edge, where its sockets belong.
    pub(crate) fn block_on_edge<F: Future<Output = anyhow::Result<()>>>(
        &self,
        make: impl FnOnce() -> F + Send,
    ) -> anyhow::Result<()> {
        self.topology.edge.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async { make().await })
        })?
    }
}
