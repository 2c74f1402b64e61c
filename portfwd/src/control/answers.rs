//! Answers that are larger than what a socket takes at once. Their number is limited: each stays in memory until its reader has
//! read it. Readers that do not go on reading are given up when others wait for a place.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::failure::{Failure, Kind, Result};

/// An answer up to this length, in bytes, goes into the socket's buffer, whether anybody reads it or not.
const SMALL: usize = 64 << 10;
/// Large answers at a time.
const LARGE_ANSWERS: usize = 8;
/// Large answers that wait for a place at a time.
const WAITING: usize = 4;
/// A reader that has taken nothing for this long loses its place to one that waits. Every client is on this machine: one that
/// reads takes milliseconds.
const STALL: Duration = Duration::from_secs(2);
/// Requests that are worked at at a time; the others wait, and hold nothing but what they have asked for.
const AT_WORK: usize = 4;

/// What all requests share.
#[derive(Clone, Debug)]
pub(super) struct Answers {
    places: Arc<Semaphore>,
    readings: Arc<Mutex<Vec<Weak<Mutex<Reading>>>>>,
    waiting: Arc<Semaphore>,
    work: Arc<Semaphore>,
}

/// JSON that is ready to be sent.
#[derive(Debug)]
pub(super) struct Answer {
    status: StatusCode,
    json: Json,
}

#[derive(Debug)]
enum Json {
    /// Goes into the socket's buffer.
    Small(Bytes),
    /// Has a place until it is read.
    Large(Arc<Mutex<Reading>>),
}

/// A large answer on its way.
#[derive(Debug)]
enum Reading {
    Open {
        rest: Bytes,
        /// When the reader last took something.
        moved: Instant,
        _place: OwnedSemaphorePermit,
    },
    /// Its place has been given to another.
    GivenUp,
}

impl Answers {
    /// Nothing is under way.
    pub(super) fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(LARGE_ANSWERS)),
            readings: Arc::default(),
            waiting: Arc::new(Semaphore::new(WAITING)),
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
        let turn = self
            .work
            .acquire()
            .await
            .map_err(|error| unfinished(&error))?;
        let json = tokio::task::spawn_blocking(work).await;
        // Whoever waits for a place keeps nobody from being worked for.
        drop(turn);
        self.answer(json.map_err(|error| unfinished(&error))??)
            .await
    }

    async fn answer(&self, json: Vec<u8>) -> Result<Answer> {
        let json = if json.len() > SMALL {
            let _waits = self.waiting.try_acquire().map_err(|_| busy(json.len()))?;
            self.begin(json).await?
        } else {
            Json::Small(json.into())
        };
        Ok(Answer {
            status: StatusCode::OK,
            json,
        })
    }

    /// Gives a large answer a place, once there is one.
    async fn begin(&self, json: Vec<u8>) -> Result<Json> {
        let place = loop {
            let place = Arc::clone(&self.places).acquire_owned();
            match timeout_at(self.next_stall(), place).await {
                Ok(place) => {
                    break place
                        .map_err(|error| Failure::during("the answer has no place", &error))?;
                }
                Err(_elapsed) => self.give_up_one(),
            }
        };
        let reading = Arc::new(Mutex::new(Reading::Open {
            rest: json.into(),
            moved: Instant::now(),
            _place: place,
        }));
        let mut readings = lock(&self.readings);
        readings.retain(|reading| reading.strong_count() > 0);
        readings.push(Arc::downgrade(&reading));
        Ok(Json::Large(reading))
    }

    /// When the reader that has stood still longest may be given up.
    fn next_stall(&self) -> Instant {
        let moved = lock(&self.readings).iter().filter_map(last_move).min();
        moved.unwrap_or_else(Instant::now) + STALL
    }

    /// Gives up the reader that has stood still longest, if it is one of those.
    fn give_up_one(&self) {
        let readings = lock(&self.readings);
        let eldest = readings.iter().min_by_key(|reading| {
            let moved = last_move(reading);
            (moved.is_none(), moved)
        });
        let Some(reading) = eldest.and_then(Weak::upgrade) else {
            return;
        };
        let mut reading = lock(&reading);
        if let Reading::Open { moved, .. } = &*reading
            && moved.elapsed() >= STALL
        {
            *reading = Reading::GivenUp;
        }
    }
}

/// When a reader last took something; `None` if it is done or given up.
fn last_move(reading: &Weak<Mutex<Reading>>) -> Option<Instant> {
    match &*lock(&*reading.upgrade()?) {
        Reading::Open { moved, .. } => Some(*moved),
        Reading::GivenUp => None,
    }
}

/// Nothing that is locked here is left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reading {
    /// The next piece, empty at the end.
    fn take(&mut self) -> io::Result<Bytes> {
        match self {
            Self::Open { rest, moved, .. } => {
                *moved = Instant::now();
                Ok(rest.split_to(rest.len().min(SMALL)))
            }
            Self::GivenUp => Err(io::Error::other("the reader took too long")),
        }
    }
}

fn busy(length: usize) -> Failure {
    let error = format!(
        "an answer of {length} bytes has no place: {LARGE_ANSWERS} clients have not read theirs, and {WAITING} more wait"
    );
    Failure::new(Kind::Failed, error)
        .hint("ask again in some seconds; those that do not read are cut off")
}

impl Answer {
    /// The same answer with another status.
    pub(super) fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let body = match self.json {
            Json::Small(json) => Body::from(json),
            // In pieces: what was handed over in one is out of sight before it is sent.
            Json::Large(reading) => Body::from_stream(stream::unfold(reading, async |reading| {
                let piece = lock(&reading).take();
                let is_end = piece.as_ref().is_ok_and(Bytes::is_empty);
                (!is_end).then_some((piece, reading))
            })),
        };
        let json = HeaderValue::from_static("application/json");
        (self.status, [(CONTENT_TYPE, json)], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn large() -> Vec<u8> {
        vec![b'7'; 3 * SMALL + 1]
    }

    async fn unread(answers: &Answers) -> Vec<Response> {
        let mut unread = Vec::new();
        for _ in 0..LARGE_ANSWERS {
            unread.push(answers.answer(large()).await.unwrap().into_response());
        }
        unread
    }

    async fn read(response: Response) -> std::result::Result<Bytes, axum::Error> {
        Ok(response.into_body().collect().await?.to_bytes())
    }

    #[tokio::test(start_paused = true)]
    async fn large_answers_wait_for_a_place_until_one_is_read_and_small_ones_never() {
        let answers = Answers::new();
        let unread = unread(&answers).await;
        assert!(answers.answer(vec![b'7'; SMALL]).await.is_ok());
        let (waited, first) = tokio::join!(answers.answer(large()), async {
            let mut unread = unread.into_iter();
            (read(unread.next().unwrap()).await.unwrap(), unread)
        });
        assert_eq!(first.0, large());
        assert_eq!(
            read(waited.unwrap().into_response()).await.unwrap(),
            large()
        );
        for response in first.1 {
            assert_eq!(read(response).await.unwrap(), large());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stands_still_loses_its_place_to_one_that_waits_and_only_then() {
        let answers = Answers::new();
        let unread = unread(&answers).await;
        tokio::time::sleep(10 * STALL).await;
        let began = Instant::now();
        assert!(answers.answer(large()).await.is_ok());
        assert_eq!(began.elapsed(), Duration::ZERO);
        let mut given_up = 0;
        for response in unread {
            match read(response).await {
                Ok(whole) => assert_eq!(whole, large()),
                Err(_) => given_up += 1,
            }
        }
        assert_eq!(given_up, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_wait() {
        let answers = Answers::new();
        let _unread = unread(&answers).await;
        let waiting: Vec<_> = (0..WAITING)
            .map(|_| {
                let answers = answers.clone();
                tokio::spawn(async move { answers.answer(large()).await.is_ok() })
            })
            .collect();
        tokio::task::yield_now().await;
        assert!(answers.answer(large()).await.is_err());
        for served in waiting {
            assert!(served.await.unwrap());
        }
    }
}
