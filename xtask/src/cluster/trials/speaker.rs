//! MetalLB's part: the public address is at a node whose injector is ready.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::cluster::{deploy, machines::Cluster, network, plan::Node};

/// How often the pods are read.
const INTERVAL: Duration = Duration::from_millis(300);

/// Follows the pods' readiness until it is finished.
#[derive(Debug)]
pub(super) struct Speaker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl Speaker {
    /// Starts with the address at the first edge node.
    pub(super) fn start(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, cluster) = (Arc::clone(&stop), cluster.clone());
        Self { stop, thread: thread::spawn(move || follow(&cluster, &stopped)) }
    }

    /// Ends it; returns where the address has been.
    pub(super) fn finish(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let moves = self.thread.join().unwrap_or_default();
        if moves.is_empty() { "the address stayed".to_owned() } else { moves.join(", ") }
    }
}

fn follow(cluster: &Cluster, stop: &AtomicBool) -> Vec<String> {
    let begun = Instant::now();
    let (mut current, mut moves) = (Node::Edge1, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        // While the API server does not answer, nothing moves.
        let ready = deploy::ready_nodes(cluster).unwrap_or_default();
        if let Some(next) = next(current, &ready) {
            if let Err(error) = network::announce(next) {
                moves.push(format!("{error:#}"));
            }
            moves.push(format!("address to {next} after {:.1} s", begun.elapsed().as_secs_f32()));
            current = next;
        }
        thread::sleep(INTERVAL);
    }
    moves
}

/// The node to which the address moves; `None` if it stays.
fn next(current: Node, ready: &[Node]) -> Option<Node> {
    if ready.contains(&current) { None } else { ready.iter().min().copied() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_leaves_only_a_node_that_is_not_ready() {
        assert_eq!(next(Node::Edge1, &[Node::Edge2, Node::Edge1]), None);
        assert_eq!(next(Node::Edge1, &[Node::Edge2]), Some(Node::Edge2));
        assert_eq!(next(Node::Edge2, &[]), None);
    }
}
