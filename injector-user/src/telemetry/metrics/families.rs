//! The metrics with a label `listener`.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::labels::{BytesLabels, ChangeLabels, ClosedLabels, ListenerLabels, ReasonLabels, ServedLabels};

/// Upper bounds in seconds: from 100 µs for a local server to the delay of a screener that tests
/// clients before the banner.
const FIRST_BYTE_BUCKETS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The families with a label `listener`.
#[derive(Clone, Debug)]
pub(super) struct Families {
    pub(super) accepted: Family<ListenerLabels, Counter>,
    pub(super) active: Family<ServedLabels, Gauge>,
    pub(super) rejected: Family<ReasonLabels, Counter>,
    pub(super) closed: Family<ClosedLabels, Counter>,
    pub(super) headers_sent: Family<ServedLabels, Counter>,
    pub(super) headers_failed: Family<ServedLabels, Counter>,
    pub(super) bytes: Family<BytesLabels, Counter>,
    pub(super) first_byte: Family<ListenerLabels, Histogram, fn() -> Histogram>,
    pub(super) enrolments: Family<ListenerLabels, Counter>,
    pub(super) enrolment_failures: Family<ReasonLabels, Counter>,
    pub(super) plane_changes: Family<ChangeLabels, Counter>,
}

impl Families {
    pub(super) fn registered(registry: &mut Registry) -> Self {
        let families = Self {
            accepted: Family::default(),
            active: Family::default(),
            rejected: Family::default(),
            closed: Family::default(),
            headers_sent: Family::default(),
            headers_failed: Family::default(),
            bytes: Family::default(),
            first_byte: Family::new_with_constructor(|| Histogram::new(FIRST_BYTE_BUCKETS)),
            enrolments: Family::default(),
            enrolment_failures: Family::default(),
            plane_changes: Family::default(),
        };
        // OpenMetrics requires the unit at the end of the name, and the crate appends it:
        // "injector" + "bytes".
        registry.register_with_unit(
            "injector",
            "Payload, without headers, by direction and by the plane that moved it",
            Unit::Bytes,
            families.bytes.clone(),
        );
        let injector = registry.sub_registry_with_prefix("injector");
        injector.register("connections_accepted", "Connections accepted", families.accepted.clone());
        injector.register("connections_active", "Connections being served", families.active.clone());
        injector.register(
            "connections_rejected",
            "Connections rejected before their backend spoke",
            families.rejected.clone(),
        );
        injector.register(
            "connections_closed",
            "Connections closed after being admitted",
            families.closed.clone(),
        );
        injector.register("headers_sent", "PROXY headers sent to a backend", families.headers_sent.clone());
        injector.register(
            "headers_failed",
            "Connections reset because the header could not be sent",
            families.headers_failed.clone(),
        );
        injector.register_with_unit(
            "header_to_first_byte",
            "Time from the header to the first byte of the backend",
            Unit::Seconds,
            families.first_byte.clone(),
        );
        injector.register("enrolments", "Directions handed to the kernel", families.enrolments.clone());
        injector.register(
            "enrolment_failures",
            "Headers or directions that stayed in user space because the kernel rejected them",
            families.enrolment_failures.clone(),
        );
        injector.register(
            "plane_changes",
            "Spliced directions paused because the target was too slow, moved to user space, and resumed by the kernel",
            families.plane_changes.clone(),
        );
        families
    }
}
