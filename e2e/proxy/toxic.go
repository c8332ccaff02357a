package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"
)

// Toxic is a fault of the network, for what comes from the homeserver.
type Toxic struct {
	// Type and Attributes are toxiproxy's: https://github.com/Shopify/toxiproxy#toxics
	Type       string
	Attributes map[string]any
}

// CutAt closes a connection after so many more bytes, HTTP's headers among them.
func CutAt(bytes int) Toxic {
	return Toxic{"limit_data", map[string]any{"bytes": bytes}}
}

// Silence lets nothing through, and closes a connection once it has been silent for so long; 0: never.
func Silence(limit time.Duration) Toxic {
	return Toxic{"timeout", map[string]any{"timeout": limit.Milliseconds()}}
}

// Reset breaks a connection off with a TCP reset. It does so to connections that are made while it is in force.
func Reset() Toxic {
	return Toxic{"reset_peer", map[string]any{"timeout": 0}}
}

// Slices lets the bytes through in small pieces with a pause after each.
func Slices(size int, pause time.Duration) Toxic {
	return Toxic{"slicer", map[string]any{"average_size": size, "size_variation": size / 2, "delay": pause.Microseconds()}}
}

// Bandwidth lets so many kilobytes through in a second.
func Bandwidth(perSecond int) Toxic {
	return Toxic{"bandwidth", map[string]any{"rate": perSecond}}
}

// Latency delays everything, by up to jitter more or less.
func Latency(delay, jitter time.Duration) Toxic {
	return Toxic{"latency", map[string]any{"latency": delay.Milliseconds(), "jitter": jitter.Milliseconds()}}
}

// Poison puts a fault on all connections, those that there are and those to come, until cure is called. What a toxic holds back is lost
// when it is cured, with its connection.
func (p *Proxy) Poison(toxic Toxic) (cure func(), err error) {
	name := fmt.Sprintf("toxic %d", p.toxics.Add(1))
	described, err := json.Marshal(map[string]any{"name": name, "type": toxic.Type, "attributes": toxic.Attributes})
	if err == nil {
		_, err = p.network.Toxics.AddToxicJson(bytes.NewReader(described))
	}
	if err != nil {
		return nil, fmt.Errorf("failed to put %s on the network: %w", toxic.Type, err)
	}
	return func() { _ = p.network.Toxics.RemoveToxic(p.context, name) }, nil
}
