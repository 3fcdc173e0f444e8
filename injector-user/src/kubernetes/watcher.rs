//! Who follows what: one watch for each Service and kind of objects, while somebody reads it.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use super::{
    api_error::ApiError,
    connection::{self, Connection},
    endpoints::{Endpoints, Place},
    exposure::Exposure,
    follower::{Follower, Health, Limits},
    load_balancer::Service,
    resource::{Page, Resource, list_request},
    slice::EndpointSlice,
    watch_state::WatchedService,
};
use crate::{
    config::{Kubernetes, ServiceRef},
    telemetry::log::target,
};

/// What a watch publishes: `None` until the API has answered once.
type State<R> = Option<Arc<<R as Resource>::State>>;

/// Follows Services. Clones share the watches.
#[derive(Clone, Debug)]
pub struct Watcher(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    connection: Arc<Connection>,
    limits: Limits,
    place: watch::Sender<Place>,
    slices: Watches<EndpointSlice>,
    services: Watches<Service>,
}

/// The watches of one kind of objects.
type Watches<R> = Mutex<BTreeMap<ServiceRef, Watch<R>>>;

struct Watch<R: Resource> {
    state: watch::Sender<State<R>>,
    health: Arc<Health>,
}

impl<R: Resource> std::fmt::Debug for Watch<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("health", &self.health).finish_non_exhaustive()
    }
}

impl Watcher {
    /// Follows nothing yet, and reads no credentials.
    #[must_use]
    pub fn new(settings: Kubernetes) -> Self {
        Self::with_limits(settings, Limits::default())
    }

    /// The same with other limits.
    pub(super) fn with_limits(settings: Kubernetes, limits: Limits) -> Self {
        let place = Place { node: settings.node.clone(), zone: settings.zone.clone() };
        Self(Arc::new(Shared {
            connection: Arc::new(Connection::new(settings)),
            limits,
            place: watch::Sender::new(place),
            slices: Mutex::default(),
            services: Mutex::default(),
        }))
    }

    /// The directories that the credentials are in. They must stay readable.
    #[must_use]
    pub fn directories(settings: &Kubernetes) -> Vec<PathBuf> {
        connection::directories(settings)
    }

    /// The endpoints of a Service, with every later change; `None` until the API has answered. To be
    /// called in a runtime, whose task follows them while a receiver exists.
    #[must_use]
    pub fn endpoints(&self, service: &ServiceRef) -> watch::Receiver<Option<Arc<Endpoints>>> {
        self.follow(|shared| &shared.slices, service, Self::learn_zone)
    }

    /// The addresses of a Service's load balancer, sorted, with every later change, as
    /// [`Self::endpoints`].
    #[must_use]
    pub fn load_balancer_addresses(&self, service: &ServiceRef) -> watch::Receiver<Option<Arc<Vec<IpAddr>>>> {
        self.follow(|shared| &shared.services, service, |_, _| ())
    }

    /// How clients reach a Service, asked for once; `None` if there is no such Service.
    ///
    /// # Errors
    /// When the API cannot be asked, or does not answer.
    pub async fn exposure(&self, service: &ServiceRef) -> Result<Option<Exposure>, String> {
        let ask = async {
            let (_, client) = self.0.connection.client().await?;
            let version = Service::VERSIONS.first().copied().unwrap_or_default();
            let request = list_request::<Service>(service, version, "")
                .map_err(|error| ApiError::Malformed(error.to_string()))?;
            let page: Page<Service> = client
                .request(request)
                .await
                .map_err(|error| ApiError::of_client::<Service>(service, &error))?;
            Ok::<_, ApiError>(page.items.first().map(Service::exposure))
        };
        ask.await.map_err(|error| error.to_string())
    }

    /// Where the injector runs, as far as it is known. Its zone may become known later.
    #[must_use]
    pub fn place(&self) -> watch::Receiver<Place> {
        self.0.place.subscribe()
    }

    /// The Services that are followed, in the order of their names.
    #[must_use]
    pub fn watched(&self) -> Vec<WatchedService> {
        let slices = lock(&self.0.slices);
        let slices = slices.iter().map(|(service, watch)| WatchedService {
            service: service.clone(),
            resource: EndpointSlice::PLURAL,
            state: watch.health.get(),
            endpoints: watch.state.borrow().clone(),
        });
        let services = lock(&self.0.services);
        let services = services.iter().map(|(service, watch)| WatchedService {
            service: service.clone(),
            resource: Service::PLURAL,
            state: watch.health.get(),
            endpoints: None,
        });
        let mut all: Vec<_> = slices.chain(services).collect();
        all.sort_by(|one, other| (&one.service, one.resource).cmp(&(&other.service, other.resource)));
        all
    }

    /// Subscribes to a watch, which is started if there is none. `learn` gets each of its states.
    fn follow<R: Resource>(
        &self,
        of: fn(&Shared) -> &Watches<R>,
        service: &ServiceRef,
        learn: fn(&Shared, &R::State),
    ) -> watch::Receiver<State<R>> {
        let mut watches = lock(of(&self.0));
        if let Some(watch) = watches.get(service) {
            return watch.state.subscribe();
        }
        let (state, receiver) = watch::channel(None);
        let health = Arc::<Health>::default();
        let follower = Follower::<R>::new(
            service.clone(),
            Arc::clone(&self.0.connection),
            self.0.limits,
            state.clone(),
            Arc::clone(&health),
            {
                let shared = Arc::clone(&self.0);
                Box::new(move |state| learn(&shared, state))
            },
        );
        watches.insert(service.clone(), Watch { state: state.clone(), health });
        drop(watches);
        tracing::info!(target: target::KUBERNETES, %service, resource = R::PLURAL, "following the service");
        let (shared, service) = (Arc::clone(&self.0), service.clone());
        tokio::spawn(async move {
            tokio::select! {
                never = follower.run() => match never {},
                () = until_unread(of(&shared), &service, &state, shared.limits.linger) => {}
            }
            tracing::info!(target: target::KUBERNETES, %service, resource = R::PLURAL, "the service is no longer followed");
        });
        receiver
    }

    /// An endpoint on the injector's own node says in which zone the node is.
    fn learn_zone(shared: &Shared, endpoints: &Endpoints) {
        shared.place.send_if_modified(|place| {
            let (None, Some(node)) = (&place.zone, &place.node) else { return false };
            let Some(zone) = endpoints.zone_of(node) else { return false };
            tracing::info!(target: target::KUBERNETES, node, zone, "an endpoint on the node names its zone");
            place.zone = Some(zone.to_owned());
            true
        });
    }
}

/// Waits until the watch has had no reader for a while, and removes it.
async fn until_unread<R: Resource>(
    watches: &Watches<R>,
    service: &ServiceRef,
    state: &watch::Sender<State<R>>,
    linger: Duration,
) {
    loop {
        state.closed().await;
        sleep(linger).await;
        let mut watches = lock(watches);
        if state.receiver_count() == 0 {
            watches.remove(service);
            return;
        }
    }
}

fn lock<R: Resource>(watches: &Watches<R>) -> MutexGuard<'_, BTreeMap<ServiceRef, Watch<R>>> {
    watches.lock().unwrap_or_else(PoisonError::into_inner)
}
