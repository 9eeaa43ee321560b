//! Tokens for requests: asked for by who finds that there is none or that it has expired, once for as many as ask at the same
//! time.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};

use super::http::Failure;

/// A login that is under way, or over.
type Login<T> = Shared<BoxFuture<'static, std::result::Result<Arc<T>, Failure>>>;

/// The logins at one server, each of which gives a `T`.
pub(crate) struct Logins<T> {
    log_in: Box<dyn Fn() -> BoxFuture<'static, std::result::Result<T, Failure>> + Send + Sync>,
    last: Mutex<Option<Login<T>>>,
}

impl<T: Send + Sync + 'static> Logins<T> {
    /// Logs in when somebody asks; `log_in` tries that once.
    pub(super) fn new(
        log_in: impl Fn() -> BoxFuture<'static, std::result::Result<T, Failure>> + Send + Sync + 'static,
    ) -> Self {
        Self { log_in: Box::new(log_in), last: Mutex::new(None) }
    }

    /// What to use now, after a login if there is nothing, or only what has `expired`. Whoever asks while a login is under
    /// way waits for its end.
    pub(crate) async fn current(&self, expired: Option<&Arc<T>>) -> std::result::Result<Arc<T>, Failure> {
        let login = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let of_use = last.take().filter(|login| match login.peek() {
                None => true,
                Some(Ok(current)) => expired.is_none_or(|expired| !Arc::ptr_eq(current, expired)),
                Some(Err(_)) => false,
            });
            let login = of_use.unwrap_or_else(|| {
                let login = (self.log_in)();
                async move { login.await.map(Arc::new) }.boxed().shared()
            });
            last.insert(login).clone()
        };
        login.await
    }
}
