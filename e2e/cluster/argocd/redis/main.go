// The cache of Argo CD, on the address that is its argument: a Redis in memory (miniredis, which Argo CD's own tests use).
package main

import (
	"log"
	"os"
	"time"

	"github.com/alicebob/miniredis/v2"
)

func main() {
	server := miniredis.NewMiniRedis()
	if err := server.StartAddr(os.Args[1]); err != nil {
		log.Fatal(err)
	}
	// Its clock stands still unless somebody moves it, and nothing would expire.
	for range time.Tick(time.Second) {
		server.FastForward(time.Second)
	}
}
