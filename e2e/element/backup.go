package element

import (
	"context"

	"maunium.net/go/mautrix/id"
)

// KeyBackup is what the client holds of the newest key backup of its account.
type KeyBackup struct {
	// Version is empty when there is none.
	Version id.KeyBackupVersion `json:"version"`
	// Trusted says that the account's identity, or a device that it vouches for, has signed the backup; MatchesKey, that it is of the
	// private key that this client has.
	Trusted    bool `json:"trusted"`
	MatchesKey bool `json:"matches_key"`
	// Active is the version that the client puts its own keys into; empty: none.
	Active id.KeyBackupVersion `json:"active"`
}

// KeyBackup asks the homeserver for the account's newest key backup, and judges it.
func (c *Client) KeyBackup(ctx context.Context) (KeyBackup, error) {
	var backup KeyBackup
	err := c.call(ctx, "keyBackup", params{}, &backup)
	return backup, err
}
