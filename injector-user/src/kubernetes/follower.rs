//! Follows the objects of one Service: lists them, watches their changes, and begins again.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _};
use kube::Client;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use super::{
    api_error::ApiError,
    connection::Connection,
    resource::{Event, Objects, Page, Resource, list_request, watch_request},
    watch_state::WatchState,
};
use crate::{config::ServiceRef, net::backoff::Backoff, telemetry::log::target};

/// Objects of one Service. A slice has up to 100 endpoints by default, and at most 1000.
const MAX_OBJECTS: usize = 1000;

/// The longest pause after a failure. A short one: when the API is back, mail should follow its pods soon.
const MAX_RETRY: Duration = Duration::from_secs(4);

/// The limits of requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// From a request to its answer, and from one part of a list to the end of it.
    pub(super) answer: Duration,
    /// How long one watch lasts. A short one, because nothing else shows that an API server is gone
    /// without closing the connection.
    pub(super) watch: Duration,
    /// How much longer than it should a watch may last.
    pub(super) late: Duration,
    /// The pause after the first failure. It grows with each further one.
    pub(super) retry: Duration,
    /// Watches do not follow each other faster.
    pub(super) pause: Duration,
    /// The longest part of a list, or event, in bytes.
    pub(super) bytes: u64,
    /// How long a watch without readers goes on: a reload drops them before there are new ones.
    pub(super) linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(20),
            watch: Duration::from_secs(60),
            late: Duration::from_secs(5),
            retry: Duration::from_millis(500),
            pause: Duration::from_secs(1),
            bytes: 16 << 20,
            linger: Duration::from_secs(5),
        }
    }
}

/// Gets each new state.
pub(super) type Learn<S> = Box<dyn Fn(&S) + Send + Sync>;

/// Follows the objects of one Service until it is dropped.
pub(super) struct Follower<R: Resource> {
    service: ServiceRef,
    connection: Arc<Connection>,
    limits: Limits,
    state: watch::Sender<Option<Arc<R::State>>>,
    health: Arc<Health>,
    learn: Learn<R::State>,
    objects: Objects<R>,
    /// Which of the versions of the API is asked for.
    version: usize,
    backoff: Backoff,
    /// Why it failed since it last succeeded.
    failing: Option<ApiError>,
}

impl<R: Resource> Follower<R> {
    pub(super) fn new(
        service: ServiceRef,
        connection: Arc<Connection>,
        limits: Limits,
        state: watch::Sender<Option<Arc<R::State>>>,
        health: Arc<Health>,
        learn: Learn<R::State>,
    ) -> Self {
        Self {
            service,
            connection,
            limits,
            state,
            health,
            learn,
            objects: Objects::new(),
            version: 0,
            backoff: Backoff::new(limits.retry, MAX_RETRY),
            failing: None,
        }
    }

    pub(super) async fn run(mut self) -> Infallible {
        loop {
            let Err(error) = self.follow().await;
            if matches!(error, ApiError::Gone) {
                tracing::debug!(target: target::KUBERNETES, service = %self.service, resource = R::PLURAL, "the watch is too old; listing again");
            } else {
                self.note_failure(error);
            }
            self.backoff.failed();
            sleep(self.backoff.wait(fastrand::f64()).unwrap_or_default()).await;
        }
    }

    async fn follow(&mut self) -> Result<Infallible, ApiError> {
        let (number, client) = self.connection.client().await?;
        let result = self.list_and_watch(&client).await;
        if !matches!(result, Err(ApiError::Gone)) {
            self.connection.replace(number);
        }
        result
    }

    async fn list_and_watch(&mut self, client: &Client) -> Result<Infallible, ApiError> {
        let mut since = self.list(client).await?;
        loop {
            let next = Instant::now() + self.limits.pause;
            since = self.watch(client, since).await?;
            // It ended as it should: the API is well.
            self.backoff.reset();
            sleep_until(next).await;
        }
    }

    /// Reads all objects. Returns their version.
    async fn list(&mut self, client: &Client) -> Result<String, ApiError> {
        let (mut objects, mut next) = (Objects::new(), String::new());
        loop {
            let page = match self.page(client, &next).await {
                // A server has one of them: it may have been upgraded meanwhile.
                Err(ApiError::NotServed { .. }) if next.is_empty() && R::VERSIONS.len() > 1 => {
                    self.version = (self.version + 1) % R::VERSIONS.len();
                    self.page(client, &next).await?
                }
                page => page?,
            };
            for object in page.items {
                self.insert(&mut objects, object)?;
            }
            next = page.metadata.next;
            if next.is_empty() {
                self.objects = objects;
                self.publish();
                self.note_answer();
                return Ok(page.metadata.resource_version);
            }
        }
    }

    async fn page(&self, client: &Client, next: &str) -> Result<Page<R>, ApiError> {
        let request = list_request::<R>(&self.service, self.api_version(), next).map_err(malformed)?;
        let within = self.limits.answer;
        let read = async {
            let body = client.request_stream(request).await.map_err(|error| self.client_error(&error))?;
            let mut bytes = Vec::new();
            // One more, to see that there is more.
            let mut body = body.take(self.limits.bytes + 1);
            body.read_to_end(&mut bytes).await.map_err(|error| ApiError::Unreachable(error.to_string()))?;
            Ok(bytes)
        };
        let bytes = timeout(within, read).await.map_err(|_elapsed| ApiError::TimedOut(within))??;
        if bytes.len() as u64 > self.limits.bytes {
            return Err(ApiError::TooLong(self.limits.bytes));
        }
        serde_json::from_slice(&bytes).map_err(malformed)
    }

    /// Follows the changes after `since` until the server ends the watch. Returns the version that is
    /// reached.
    async fn watch(&mut self, client: &Client, mut since: String) -> Result<String, ApiError> {
        let Limits { answer, watch, late, .. } = self.limits;
        let seconds = u32::try_from(watch.as_secs()).unwrap_or(u32::MAX).max(1);
        let request =
            watch_request::<R>(&self.service, self.api_version(), &since, seconds).map_err(malformed)?;
        let end = Instant::now() + watch + late;
        let body = timeout(answer, client.request_stream(request));
        let body = body.await.map_err(|_elapsed| ApiError::TimedOut(answer))?;
        let mut body = body.map_err(|error| self.client_error(&error))?;
        self.note_answer();
        loop {
            let line = timeout_at(end, read_line(&mut body, self.limits.bytes));
            let Some(line) = line.await.map_err(|_elapsed| ApiError::TimedOut(watch + late))?? else {
                return Ok(since);
            };
            let version = match serde_json::from_slice(&line).map_err(malformed)? {
                Event::Added(object) | Event::Modified(object) => {
                    let object: R = object;
                    let version = object.metadata().resource_version.clone();
                    let mut objects = std::mem::take(&mut self.objects);
                    let inserted = self.insert(&mut objects, object);
                    self.objects = objects;
                    inserted?;
                    self.publish();
                    version
                }
                Event::Deleted(object) => {
                    self.objects.remove(&object.metadata().name);
                    self.publish();
                    object.metadata().resource_version.clone()
                }
                Event::Bookmark(bookmark) => bookmark.metadata.resource_version,
                Event::Error(status) => return Err(ApiError::of_status::<R>(&self.service, status)),
            };
            if version.is_empty() {
                return Err(ApiError::Malformed("an object without a resourceVersion".to_owned()));
            }
            since = version;
            self.backoff.reset();
            self.note_answer();
        }
    }

    fn api_version(&self) -> &'static str {
        R::VERSIONS.get(self.version).copied().unwrap_or_default()
    }

    fn insert(&self, objects: &mut Objects<R>, object: R) -> Result<(), ApiError> {
        let name = object.metadata().name.clone();
        if name.is_empty() {
            return Err(ApiError::Malformed("an object without a name".to_owned()));
        }
        objects.insert(name, object);
        if objects.len() > MAX_OBJECTS { Err(ApiError::TooMany(MAX_OBJECTS)) } else { Ok(()) }
    }

    /// Publishes what the objects say now, if it is something else.
    fn publish(&self) {
        let new = R::state(self.objects.values());
        (self.learn)(&new);
        self.state.send_if_modified(|state| {
            let differs = state.as_deref() != Some(&new);
            if differs {
                *state = Some(Arc::new(new));
            }
            differs
        });
    }

    fn client_error(&self, error: &kube::Error) -> ApiError {
        ApiError::of_client::<R>(&self.service, error)
    }

    fn note_answer(&mut self) {
        self.health.answered();
        if self.failing.take().is_some() {
            tracing::info!(target: target::KUBERNETES, service = %self.service, resource = R::PLURAL, "following the service again");
        }
    }

    /// Warns once of each kind of failure, until the API answers again.
    fn note_failure(&mut self, error: ApiError) {
        self.health.failed(error.to_string());
        let service = &self.service;
        let known = self.state.borrow().is_some();
        match &self.failing {
            Some(before) if before.is_like(&error) => {
                tracing::debug!(target: target::KUBERNETES, %service, resource = R::PLURAL, %error, "following the service still fails");
            }
            _ if known => {
                tracing::warn!(target: target::KUBERNETES, %service, resource = R::PLURAL, %error, "following the service failed; its last known addresses stay in use");
            }
            _ => {
                tracing::warn!(target: target::KUBERNETES, %service, resource = R::PLURAL, %error, "following the service failed; none of its addresses is known");
            }
        }
        self.failing = Some(error);
    }
}

/// The next line without its end; `None` at the end. A last line that was cut is returned as it is.
async fn read_line(
    body: &mut (impl AsyncBufRead + Unpin),
    max_bytes: u64,
) -> Result<Option<Vec<u8>>, ApiError> {
    let mut line = Vec::new();
    let read = body.take(max_bytes).read_until(b'\n', &mut line).await;
    read.map_err(|error| ApiError::Unreachable(error.to_string()))?;
    let is_whole = line.pop_if(|last| *last == b'\n').is_some();
    if !is_whole && line.len() as u64 == max_bytes {
        return Err(ApiError::TooLong(max_bytes));
    }
    Ok(Some(line).filter(|line| is_whole || !line.is_empty()))
}

fn malformed(error: impl std::fmt::Display) -> ApiError {
    ApiError::Malformed(error.to_string())
}

/// The state of a watch, which its follower changes and others read.
#[derive(Debug, Default)]
pub(super) struct Health(Mutex<WatchState>);

impl Health {
    pub(super) fn get(&self) -> WatchState {
        self.lock().clone()
    }

    fn answered(&self) {
        let mut state = self.lock();
        state.last_answer = Some(SystemTime::now());
        state.error = None;
    }

    fn failed(&self, error: String) {
        let mut state = self.lock();
        state.failures += 1;
        state.error = Some(error);
    }

    fn lock(&self) -> MutexGuard<'_, WatchState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
