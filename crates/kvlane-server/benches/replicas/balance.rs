//! A plain balancer in front of several routers: each connection goes to the next one in turn.
//!
//! It stands for the load balancer that replicas have in front of them, and knows nothing of HTTP.

use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};

/// Listens until it is killed.
pub async fn run(listen: SocketAddr, routers: Vec<SocketAddr>) {
    let listener = TcpListener::bind(listen).await.unwrap();
    for router in routers.iter().cycle() {
        let (mut client, _) = listener.accept().await.unwrap();
        let router = *router;
        tokio::spawn(async move {
            let mut server = TcpStream::connect(router).await?;
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            tokio::io::copy_bidirectional(&mut client, &mut server).await
        });
    }
}
