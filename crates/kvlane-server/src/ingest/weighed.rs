//! A queue bounded by what lies in it, not by how many items: messages differ in size by a factor of a million.
//!
//! Senders wait in the order in which they came, so that none starves.

use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Makes a queue with `room` units of weight.
pub(crate) fn weighed<T>(room: u32) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = unbounded_channel();
    let free = Arc::new(Semaphore::new(room as usize));
    (Sender { sender, free, room }, Receiver { receiver })
}

/// The queue's other end is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Closed;

pub(crate) struct Sender<T> {
    sender: UnboundedSender<(T, OwnedSemaphorePermit)>,
    free: Arc<Semaphore>,
    room: u32,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), free: Arc::clone(&self.free), room: self.room }
    }
}

impl<T> Sender<T> {
    /// Waits until there is room. An item heavier than the whole queue travels alone. Cancel-safe: `item` is sent, or dropped.
    pub(crate) async fn send(&self, item: T, weight: usize) -> Result<(), Closed> {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).clamp(1, self.room);
        let free = Arc::clone(&self.free);
        let permit = tokio::select! {
            permit = free.acquire_many_owned(weight) => permit.expect("the semaphore is never closed"),
            () = self.sender.closed() => return Err(Closed),
        };
        self.sender.send((item, permit)).map_err(|_| Closed)
    }

    /// Units of weight that lie in the queue.
    pub(crate) fn used(&self) -> u64 {
        u64::from(self.room).saturating_sub(self.free.available_permits() as u64)
    }
}

pub(crate) struct Receiver<T> {
    receiver: UnboundedReceiver<(T, OwnedSemaphorePermit)>,
}

impl<T> Receiver<T> {
    /// The next item; `None` once all senders are gone and the queue is empty. Cancel-safe.
    pub(crate) async fn recv(&mut self) -> Option<T> {
        self.receiver.recv().await.map(|(item, _)| item)
    }

    /// An item that lies there already.
    pub(crate) fn try_recv(&mut self) -> Option<T> {
        self.receiver.try_recv().ok().map(|(item, _)| item)
    }

    /// As [`Receiver::recv`], for a thread outside the runtime.
    pub(crate) fn blocking_recv(&mut self) -> Option<T> {
        self.receiver.blocking_recv().map(|(item, _)| item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn a_full_queue_makes_the_sender_wait_and_loses_nothing() {
        let (sender, mut receiver) = weighed(10);
        sender.send(1, 6).await.unwrap();
        assert!(sender.send(2, 6).now_or_never().is_none());
        assert_eq!(sender.used(), 6);
        assert_eq!(receiver.recv().await, Some(1));
        sender.send(3, 1000).await.unwrap();
        assert_eq!(receiver.try_recv(), Some(3));
        drop(receiver);
        assert_eq!(sender.send(4, 1).await, Err(Closed));
    }
}
