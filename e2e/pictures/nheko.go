package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"maunium.net/go/mautrix"
)

// nhekoConfig are nheko's settings, with a login that was made before: its own would ask for a homeserver with TLS. There is no
// keyring on this desktop, so the client is told to do without. Nothing distracts: no notifications, no tray, no list of spaces.
const nhekoConfig = `[General]
run_without_secure_secrets_service=true

[auth]
access_token=%s
device_id=%s
home_server=%s
user_id=%s

[user]
theme=light
font_family=Inter
font_size=9.5
emoji_font_family=Noto Color Emoji
group_view=false
desktop_notifications=false
read_receipts=false
typing_notifications=false
timeline\buttons=false
timeline\message_hover_highlight=false
sidebar\room_list_width=220

[window]
width=%d
height=%d
`

// startNheko starts the client nheko with the login of somebody who has just made their account, and has it set up their encryption.
func (d *desktop) startNheko(ctx context.Context, login *mautrix.Client) error {
	dir := filepath.Join(d.home, ".config", "nheko")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	config := fmt.Sprintf(nhekoConfig, login.AccessToken, login.DeviceID, login.HomeserverURL, login.UserID, width, usualHeight)
	if err := os.WriteFile(filepath.Join(dir, "nheko.conf"), []byte(config), 0o600); err != nil {
		return err
	}
	if _, err := d.launch(exec.Command("nheko", "--log-level", "info", "--log-type", "stderr")); err != nil {
		return err
	}
	// The client offers to set up encryption, shows the recovery key, and says that it has worked.
	for _, step := range []string{"Setup Encryption", "This is your recovery key."} {
		if err := d.see(ctx, step); err != nil {
			return err
		}
		if err := d.click(ctx, button, "OK"); err != nil {
			return err
		}
	}
	window, err := d.run(ctx, "xdotool", "search", "--onlyvisible", "--class", "nheko")
	if err != nil {
		return err
	}
	d.window, d.height = strings.TrimSpace(string(window)), usualHeight
	return nil
}
