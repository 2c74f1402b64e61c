//! Answers that are larger than what a socket takes at once. Their number is limited: each stays in memory until its reader has
//! read it.

use std::sync::Arc;

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::failure::{Failure, Kind, Result};

/// An answer up to this length, in bytes, goes into the socket's buffer, whether anybody reads it or not.
const SMALL: usize = 64 << 10;
/// Large answers at a time.
const LARGE_ANSWERS: usize = 8;
/// Requests that are worked at at a time; the others wait, and hold nothing but what they have asked for.
const AT_WORK: usize = 4;

/// What all requests share.
#[derive(Clone, Debug)]
pub(super) struct Answers {
    large: Arc<Semaphore>,
    work: Arc<Semaphore>,
}

/// JSON that is ready to be sent.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    json: Bytes,
    permit: Option<OwnedSemaphorePermit>,
}

impl Answers {
    /// Nothing is under way.
    pub(super) fn new() -> Self {
        Self {
            large: Arc::new(Semaphore::new(LARGE_ANSWERS)),
            work: Arc::new(Semaphore::new(AT_WORK)),
        }
    }

    /// Works at a request, on a thread where it may take its time; `work` makes the JSON.
    pub(super) async fn work_at(
        &self,
        work: impl FnOnce() -> Result<Vec<u8>> + Send + 'static,
    ) -> Result<Answer> {
        let unfinished = |error: &(dyn std::error::Error + 'static)| {
            Failure::during("the request was not finished", error)
        };
        let _turn = self
            .work
            .acquire()
            .await
            .map_err(|error| unfinished(&error))?;
        let json = tokio::task::spawn_blocking(work).await;
        self.answer(json.map_err(|error| unfinished(&error))??)
    }

    fn answer(&self, json: Vec<u8>) -> Result<Answer> {
        let permit = if json.len() > SMALL {
            let permit = Arc::clone(&self.large).try_acquire_owned();
            Some(permit.map_err(|_| busy(json.len()))?)
        } else {
            None
        };
        Ok(Answer {
            status: StatusCode::OK,
            json: json.into(),
            permit,
        })
    }
}

fn busy(length: usize) -> Failure {
    let error = format!(
        "an answer of {length} bytes has to wait: {LARGE_ANSWERS} clients have not read theirs yet"
    );
    Failure::new(Kind::Failed, error).hint("ask again; they are cut off within 30 s")
}

impl Answer {
    /// The same answer with another status.
    pub(super) fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let Self {
            status,
            json,
            permit,
        } = self;
        let body = match permit {
            None => Body::from(json),
            // In pieces: what was handed over in one is out of sight before it is sent.
            Some(permit) => Body::from_stream(stream::unfold(
                (json, permit),
                async |(mut rest, permit)| {
                    let piece = rest.split_to(rest.len().min(SMALL));
                    (!piece.is_empty())
                        .then(|| (Ok::<_, std::convert::Infallible>(piece), (rest, permit)))
                },
            )),
        };
        let json = HeaderValue::from_static("application/json");
        (status, [(CONTENT_TYPE, json)], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn large_answers_are_counted_until_they_are_read_and_small_ones_never() {
        let answers = Answers::new();
        let large = vec![b'7'; 3 * SMALL + 1];
        let unread: Vec<_> = (0..LARGE_ANSWERS)
            .map(|_| answers.answer(large.clone()).unwrap().into_response())
            .collect();
        assert!(answers.answer(large.clone()).is_err());
        assert!(answers.answer(vec![b'7'; SMALL]).is_ok());
        for response in unread {
            let read = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(read, large);
        }
        assert!(answers.answer(large).is_ok());
    }
}
