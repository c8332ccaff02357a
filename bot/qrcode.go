package bot

import (
	"fmt"

	"maunium.net/go/mautrix/event"
	"rsc.io/qr"
)

// qrDot is how wide a dot of a QR code is, in pixels: on a phone's screen the code is as wide as a thumb is long.
const qrDot = 8

// qrBorder is the white around the code, in dots, on both sides together.
const qrBorder = 8

// paintCode makes a picture of bytes, as a QR code. They are one segment, which all apps can read: some take the first segment for all of it.
// https://spec.matrix.org/v1.16/client-server-api/#qr-code-format
func paintCode(name string, data []byte) (picture attachmentFile, err error) {
	code, err := qr.Encode(string(data), qr.M)
	if err != nil {
		return picture, fmt.Errorf("failed to make a QR code: %w", err)
	}
	code.Scale = qrDot
	size := (code.Size + qrBorder) * qrDot
	return attachmentFile{msgType: event.MsgImage, name: name, mimeType: "image/png", data: code.PNG(), width: size, height: size}, nil
}
